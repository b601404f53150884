"""Builds the compiled engines; every static fact is in pyproject.toml.

Without a compiler the installation still succeeds, in pure Python, and says what that costs.
FAKD_CPU=0 leaves the C++ engine out; FAKD_CPU=1 makes its failure an error. FAKD_CUDA=0|1 does
the same for the CUDA engine, for the cards in TORCH_CUDA_ARCH_LIST; by default, FAKD_CUDA=auto,
it is built only for a torch with CUDA.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from build_backend import TORCH, compile_kernels, find_torch, wants_cuda

# LibTorch's stable ABI of 2.10: one binary serves every later torch, and every Python.
TORCH_TARGET_VERSION = "0x020a000000000000"
SUFFIX = ".abi3.so"
COST = """
================================================================================
fakd is being installed WITHOUT its compiled {engine} engine:
  {reason}
Everything works, {cost}, then reinstall. fakd_kernels.engines() tells what is built.
================================================================================
"""
CPU_COST = """in plain PyTorch: losses of CPU tensors take 2 to 10 times as long. CUDA tensors
are not affected. To build the engine, install g++ or clang++ and torch >= 2.10"""
CUDA_COST = """and Triton serves CUDA tensors. CPU tensors are not affected. To build the engine,
install the CUDA toolkit"""


class BuildLibraries(build_ext):
    """Builds libraries that torch loads: no module init, no Python version in the name."""

    def run(self) -> None:
        if CUDA_LIBRARY not in self.extensions:
            sys.stderr.write("fakd's CUDA engine is not built: torch has none, or FAKD_CUDA=0.\n")
        super().run()

    def build_extension(self, extension: Extension) -> None:
        is_cuda = extension is CUDA_LIBRARY
        try:
            torch = find_torch()
            if torch is None:
                raise RuntimeError(f"no {TORCH} was found to build against")
            folders = ("include", "include/torch/csrc/api/include")
            extension.include_dirs += [str(torch / folder) for folder in folders]
            extension.library_dirs.append(str(torch / "lib"))
            if is_cuda:
                extension.extra_objects, folders = compile_kernels(self.build_temp, self.spawn)
                extension.library_dirs += folders
            super().build_extension(extension)
        except Exception as error:
            if os.environ.get("FAKD_CUDA" if is_cuda else "FAKD_CPU") == "1":
                raise
            engine, cost = ("CUDA", CUDA_COST) if is_cuda else ("C++", CPU_COST)
            sys.stderr.write(COST.format(engine=engine, reason=error, cost=cost))
            # Editable installs copy what was built; an empty list keeps them from failing here.
            self.extensions = [e for e in self.extensions if e is not extension]

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + SUFFIX

    def get_export_symbols(self, extension: Extension) -> list[str]:
        return []  # nor a PyInit

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


class AbiWheel(bdist_wheel):
    """One wheel for every CPython >= 3.10, since the libraries do not touch Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if self.root_is_pure:
            return python, abi, platform
        # A wheel whose libraries could not be built must not pass for one that has them.
        has_library = any(Path(self.bdist_dir).glob(f"fakd_kernels/*{SUFFIX}"))
        return ("cp310", "abi3", platform) if has_library else ("py3", "none", "any")


def library(name: str, *folders: str, macros: tuple = (), **options) -> Extension:
    def find(pattern: str) -> list[str]:
        return [str(path) for folder in folders for path in sorted(Path(folder).glob(pattern))]

    return Extension(
        f"fakd_kernels.{name}",
        find("*.cpp"),
        depends=[*map(str, sorted(Path("csrc").rglob("*.[hi]*"))), *find("*.cu")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), *macros],
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"],
        language="c++",
        **options,
    )


CPU_LIBRARY = library("_C_cpu", "csrc", "csrc/cpu", libraries=["torch_cpu", "torch"])
CUDA_LIBRARY = library(
    "_C_cuda",
    "csrc/cuda",
    macros=(("USE_CUDA", "1"),),  # torch's headers declare the current stream
    # The runtime is linked in, and hidden: torch brings its own, maybe of another version.
    libraries=["cudart_static", "rt", "pthread", "dl", "torch_cpu"],
    # libtorch.so names libtorch_cuda.so, which holds the stream; nothing else asks for it.
    extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--exclude-libs,libcudart_static.a"],
)

setup(
    ext_modules=[
        *([] if os.environ.get("FAKD_CPU") == "0" else [CPU_LIBRARY]),
        *([CUDA_LIBRARY] if wants_cuda() else []),
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AbiWheel},
)
