"""Builds the compiled engines; every static fact is in pyproject.toml.

Without a compiler the installation still succeeds, in pure Python, and says what that costs.
FAKD_CPU=0 leaves the C++ engine out; FAKD_CPU=1 makes its failure an error.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from build_backend import TORCH, find_torch

# LibTorch's stable ABI of 2.10: one binary serves every later torch, and every Python.
TORCH_TARGET_VERSION = "0x020a000000000000"
SUFFIX = ".abi3.so"
COST = """
================================================================================
fakd is being installed WITHOUT its compiled C++ engine:
  {reason}
Everything works, in plain PyTorch: losses of CPU tensors take 2 to 10 times as
long. CUDA tensors are not affected. To build the engine, install g++ or clang++
and torch >= 2.10, then reinstall. fakd_kernels.engines() tells what is built.
================================================================================
"""


class BuildLibraries(build_ext):
    """Builds libraries that torch loads: no module init, no Python version in the name."""

    def build_extension(self, extension: Extension) -> None:
        try:
            torch = find_torch()
            if torch is None:
                raise RuntimeError(f"no {TORCH} was found to build against")
            extension.include_dirs += [
                str(torch / "include"),
                str(torch / "include/torch/csrc/api/include"),
            ]
            extension.library_dirs.append(str(torch / "lib"))
            super().build_extension(extension)
        except Exception as error:
            if os.environ.get("FAKD_CPU") == "1":
                raise
            sys.stderr.write(COST.format(reason=error))
            # Editable installs copy what was built; an empty list keeps them from failing here.
            self.extensions = [e for e in self.extensions if e is not extension]

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + SUFFIX

    def get_export_symbols(self, extension: Extension) -> list[str]:
        return extension.export_symbols

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


class AbiWheel(bdist_wheel):
    """One wheel for every CPython >= 3.10, since the libraries do not touch Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("cp310", "abi3", platform)


CPU_LIBRARY = Extension(
    "fakd_kernels._C_cpu",
    [str(path) for path in sorted([*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")])],
    depends=[str(path) for path in sorted(Path("csrc").rglob("*.[hi]*"))],
    define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"],
    libraries=["torch_cpu", "torch"],
    language="c++",
)

setup(
    ext_modules=[] if os.environ.get("FAKD_CPU") == "0" else [CPU_LIBRARY],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AbiWheel},
)
