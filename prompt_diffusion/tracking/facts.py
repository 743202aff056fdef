"""What MLflow's run says about a training beside its curves: configuration, inputs, code, versions; imports no torch."""

import getpass
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_diffusion.store.codec import find_versions

_PACKAGE = Path(__file__).resolve().parent.parent


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values as texts under dotted names, such as ``optimizer.learning_rate``; lists in one line."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = ", ".join(map(str, value))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def collect_tags() -> dict[str, str]:
    """Return git revision, versions and user, as tags; those that MLflow's page knows under its own names."""
    versions = {f"version.{name}": version for name, version in find_versions().items()}
    source = {"mlflow.user": find_user(), "mlflow.source.name": _PACKAGE.name, "mlflow.source.type": "LOCAL"}
    return find_revision(_PACKAGE) | versions | source


def find_user() -> str:
    """Return who runs this: a name, or the number of a user without one, as containers have them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no variable names the user, and there is no entry in the passwd file
        return f"uid {os.getuid()}"


def find_revision(package: Path) -> dict[str, str]:
    """Return git's revision of a package's checkout and whether anything in it differs from that; nothing without git."""
    try:
        # A package that is installed inside of somebody else's checkout is not tracked there: that revision is not ours.
        _ask_git(package, "ls-files", "--error-unmatch", "__init__.py")
        revision, changes = _ask_git(package, "rev-parse", "HEAD"), _ask_git(package, "status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):  # no git, or none that may be run
        return {}
    return {"git.revision": revision, "git.is_dirty": str(bool(changes)), "mlflow.source.git.commit": revision}


def _ask_git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return result.stdout.strip()
