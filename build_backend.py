"""The build backend: setuptools, which needs torch's headers and never imports torch.

The headers of the torch that the user already has are taken, also under pip's build isolation;
only an environment without one makes the build download torch. LibTorch's stable ABI makes it
equal which torch >= 2.10 that is.
"""

import re
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

TORCH = "torch>=2.10"
_LEAST = (2, 10)


def find_torch() -> Path | None:
    """The folder of an installed torch that is new enough, in this environment or around it."""
    folders = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    for folder in folders:
        version = Path(folder) / "torch" / "version.py"
        if version.is_file():
            found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text())
            if found and tuple(map(int, found.groups())) >= _LEAST:
                return version.parent
    return None


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()


def _torch() -> list[str]:
    return [] if find_torch() else [TORCH]
