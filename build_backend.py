"""The build backend: setuptools, which needs torch's headers and never imports torch.

The headers of the torch that the user already has are taken, also under pip's build isolation;
only an environment without one makes the build download torch. LibTorch's stable ABI makes it
equal which torch >= 2.10 that is.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

TORCH = "torch>=2.10"
_LEAST = (2, 10)
NVCC_FLAGS = ("-std=c++17", "-O3")
# One cubin serves later cards of its generation too, which those of 9.0a and 10.0a would not: the
# kernels use nothing of theirs. PTX of the last serves cards to come.
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


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


def wants_cuda() -> bool:
    """Whether to build the CUDA engine: by FAKD_CUDA, else where torch was built with CUDA."""
    choice = os.environ.get("FAKD_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"FAKD_CUDA must be 0, 1 or auto: got {choice!r}; leave it out for auto.")
    if choice != "auto":
        return choice == "1"
    torch = find_torch()
    version = "" if torch is None else (torch / "version.py").read_text()
    return re.search(r"^cuda\b.*= '", version, re.MULTILINE) is not None


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME where that is set, else on the path or where NVIDIA's packages put it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((Path(place) for place in places if place and os.path.isfile(place)), None)


def nvcc_folders(nvcc: Path) -> dict[str, list[str]]:
    """Its folders of "INCLUDES" and "LIBRARIES", by its own word: nvcc may be a wrapper."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    lines = dict(re.findall(r"^#\$ (INCLUDES|LIBRARIES)=(.*)$", words, re.MULTILINE))
    return {name: re.findall(r'"-[IL]([^"]+)"', line) for name, line in lines.items()}


def nvcc_targets(architectures: str = "") -> list[str]:
    """nvcc's arguments for TORCH_CUDA_ARCH_LIST, such as "8.0;9.0a;12.0+PTX"."""
    arguments = []
    for name in re.split(r"[;, ]+", architectures.strip() or ARCHITECTURES):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if found is None:
            raise ValueError(
                "TORCH_CUDA_ARCH_LIST must list capabilities such as 8.0;9.0a;12.0+PTX: "
                f"got {name!r}; leave it out for {ARCHITECTURES}."
            )
        number = found[1] + found[2]
        codes = [f"sm_{number}", *([f"compute_{number}"] if found[3] else [])]
        arguments += [f"-gencode=arch=compute_{number},code=[{','.join(codes)}]"]
    return arguments


def nvcc_command() -> tuple[list[str], list[str]]:
    """nvcc with what every source is compiled with, and the folders of the libraries to link."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc was found; CUDA_HOME names the folder of a CUDA toolkit")
    targets = nvcc_targets(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    # One thread per architecture, up to the number of cores.
    command = [str(nvcc), *NVCC_FLAGS, *targets, "--threads=0"]
    command.append("-Xcompiler=-fPIC,-fvisibility=hidden")
    return command, nvcc_folders(nvcc)["LIBRARIES"]


def compile_kernels(folder: str, spawn: Callable[[list[str]], None]) -> tuple[list, list[str]]:
    """Every CUDA source with nvcc: the objects, in this folder, and folders of libraries."""
    command, libraries = nvcc_command()
    Path(folder).mkdir(parents=True, exist_ok=True)
    objects = []
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        objects.append(str(Path(folder) / f"{source.stem}.cu.o"))
        spawn([*command, "-c", str(source), "-o", objects[-1]])
    return objects, libraries


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()


def _torch() -> list[str]:
    return [] if find_torch() else [TORCH]
