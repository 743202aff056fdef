"""What CONTRIBUTING.md tells a newcomer to write works as it stands there."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from prompt_diffusion.data import ingest
from prompt_diffusion.data.ingest import Ingest, IngestConfig
from prompt_diffusion.data.sources.scenes import ScenesConfig
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.store.stage import Context, obtain

GUIDE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
BLOCKS = [block.split("```")[0] for block in GUIDE.split("```python\n")[1:]]


def write_module(folder: Path, class_name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Write the block that has a class to a file, and import it."""
    name = f"contributing_{class_name.lower()}"
    path = folder / f"{name}.py"
    path.write_text(next(block for block in BLOCKS if f"class {class_name}" in block))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_guides_source_is_one_file_and_a_line_in_each_table(tmp_path, tmp_store, monkeypatch):
    module = write_module(tmp_path, "GradientsSource", monkeypatch)
    assert any(block.strip() == '"gradients": GradientsSource,' for block in BLOCKS)
    monkeypatch.setitem(ingest._SOURCES, "gradients", module.GradientsSource)

    class Config(IngestConfig):
        source: module.GradientsConfig = module.GradientsConfig(num_groups=20)

    stage = Ingest(Config(image_size=16))
    pairs = obtain(stage, Context(tmp_store, None))
    assert pairs.rows == 20
    assert obtain(Ingest(Config(image_size=16)), Context(tmp_store, None)) == pairs
    assert Ingest(Config(image_size=32)).identity != stage.identity


def test_the_guides_stage_is_made_once_and_known_by_its_configuration_and_inputs(tmp_path, tmp_store, monkeypatch):
    module = write_module(tmp_path, "CountWords", monkeypatch)
    context = Context(tmp_store, None)
    source = ScenesConfig(num_groups=20, pairs_per_group=1)
    pairs = obtain(Ingest(IngestConfig(source=source, image_size=16)), context)
    stage = module.CountWords(module.CountConfig(num_words=3), pairs)
    counted = obtain(stage, context)
    words = json.loads(open_manifest(counted.uri).read_file("words.json"))
    assert len(words) == 3
    monkeypatch.setattr(module.CountWords, "run", None)  # sealed: it is not run again
    assert obtain(module.CountWords(module.CountConfig(num_words=3), pairs), context) == counted
    assert module.CountWords(module.CountConfig(num_words=4), pairs).identity != stage.identity
