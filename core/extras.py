"""Optional dependencies: what is missing, and the command that installs it."""

import importlib.metadata
import re
import shlex


def missing_extra(package: str, extra: str | None = None) -> str:
    """Return the part of an error message that says `package` is missing and how to install it.

    Args:
        package: name of the package on PyPI.
        extra: an extra of diffusers-ddgan that includes it; whatever else of it is missing is installed along with it.
    """
    names = {requirement: _name(requirement) for requirement in _requirements(extra)}
    missing = [requirement for requirement, name in names.items() if name == package or not _is_installed(name)]
    of_extra = f" (of the extra [{extra}])" if names else ""
    return f"{package}{of_extra} is not installed. Run pip install {shlex.join(missing or [package])}"


def missing_import(error: ModuleNotFoundError) -> str | None:
    """Return the same for an import that failed, or None if no extra includes the package."""
    package = (error.name or "").partition(".")[0].replace("_", "-")
    for extra in ("train", "eval", "gradio"):
        if package in map(_name, _requirements(extra)):
            return f"{missing_extra(package, extra)}."
    return None


def _requirements(extra: str | None) -> list[str]:
    """Return the requirements of an extra; none where the package is used without being installed, as in a Space."""
    try:
        requirements = importlib.metadata.requires("diffusers-ddgan") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    parts = [requirement.partition(";") for requirement in requirements]
    return [requirement.strip() for requirement, _, marker in parts if f'extra == "{extra}"' in marker]


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
