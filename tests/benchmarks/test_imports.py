"""Every name that a benchmark imports from the project exists: nothing else runs the benchmarks when the code changes."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def list_imports(script: Path) -> list[tuple[str, str]]:
    """Return (module, name) of each import from the project, those within functions included."""
    nodes = (node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom))
    return [
        (node.module, alias.name)
        for node in nodes
        if node.module and node.module.partition(".")[0] in ("prompt_diffusion", "flows", "tasks")
        for alias in node.names
    ]


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda script: script.stem)
def test_every_import_from_the_project_resolves(script):
    imports = list_imports(script)
    assert imports or script.stem.startswith("_")
    for module, name in imports:
        assert hasattr(import_module(module), name), f"{script.name} imports {name} from {module}"
