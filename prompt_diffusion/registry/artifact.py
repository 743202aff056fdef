"""What is uploaded as a model: one folder that our own loader, MLflow's scoring server and a hub can all use.

``pipeline/`` holds the diffusers folder, the list of its digests and the model card; beside it are ``facts.json`` and what
MLflow needs to serve it: ``MLmodel``, three lines of code, and the requirements. The weights are stored once.
"""

import json
import platform
import shutil
from importlib.metadata import version as find_package_version
from pathlib import Path

from prompt_diffusion.model.references import PIPELINE_FOLDER
from prompt_diffusion.registry.cache import DIGESTS_FILE
from prompt_diffusion.registry.facts import ModelFacts

FACTS_FILE = "facts.json"
_CODE_FILE = "model_code.py"


def name_artifact(name: str) -> str:
    """Return the path, among a run's artifacts, of the model that is registered under a name."""
    return f"models/{name}"


def write_artifact(root: Path, facts: ModelFacts, listing: bytes, digest: str, run_id: str) -> None:
    """Write everything around a pipeline in ``root/pipeline`` that makes it an MLflow model."""
    (root / PIPELINE_FOLDER / DIGESTS_FILE).write_bytes(listing)
    (root / FACTS_FILE).write_text(facts.model_dump_json(indent=2))
    shutil.copyfile(Path(__file__).with_name(_CODE_FILE), root / _CODE_FILE)
    requirements = [f"{name}=={find_package_version(name)}" for name in ("prompt-diffusion", "mlflow")]
    (root / "requirements.txt").write_text("\n".join(requirements) + "\n")
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (root / "python_env.yaml").write_text(json.dumps(environment))  # JSON is YAML
    _write_mlmodel(root, digest, run_id)


def _write_mlmodel(root: Path, digest: str, run_id: str) -> None:
    """Write MLflow's description by hand: ``save_model`` would name folders of this machine, and copy the weights."""
    import mlflow
    from mlflow.models import Model

    from prompt_diffusion.registry.serving import DIGEST_KEY, build_signature

    model = Model(run_id=run_id, signature=build_signature())
    mlflow.pyfunc.add_to_model(
        model,
        loader_module="mlflow.pyfunc.loaders.code_model",
        python_env="python_env.yaml",
        model_config={DIGEST_KEY: digest},
        model_code_path=_CODE_FILE,
        artifacts={PIPELINE_FOLDER: {"path": PIPELINE_FOLDER, "uri": PIPELINE_FOLDER}},
        streamable=False,
    )
    model.model_size_bytes = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    model.save(str(root / "MLmodel"))
