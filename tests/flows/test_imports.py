"""Workers and deploys start fast only while importing the flows loads nothing heavy."""

import json
import pkgutil
import subprocess
import sys

import flows

HEAVY = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "mlflow", "matplotlib", "cleanfid"}
MODULES = [module.name for module in pkgutil.iter_modules(flows.__path__)]


def test_importing_every_flow_loads_nothing_heavy() -> None:
    assert "reproduce" in MODULES
    imports = "; ".join(f"import flows.{name}" for name in MODULES)
    code = f"import sys, json; {imports}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(json.loads(result.stdout.splitlines()[-1]))
