"""Loads the compiled libraries if they were built; otherwise holds the reason they are absent.

Two libraries, both on LibTorch's stable ABI: `_C_cpu` (any torch) and `_C_cuda` (only where torch
itself has CUDA). They register raw private operators under `torch.ops.fakd_ext`.
"""

import functools
from pathlib import Path

import torch

_REMEDIES = {
    "_C_cpu": "reinstall with a C++17 compiler (g++ or clang++) to build it",
    "_C_cuda": "reinstall with the CUDA toolkit and FAKD_CUDA=1 to build it",
}


def _load(stem: str) -> str | None:
    """Load one library; None on success, else the reason in words."""
    remedy = _REMEDIES[stem]
    found = sorted(Path(__file__).parent.glob(f"{stem}*.so"))
    if not found:
        return f"the compiled library {stem} was not built; {remedy}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        # torch 2.13 says no more than the name; the loader's own words are behind that.
        words = error.__cause__ or error
        return f"the compiled library {found[0].name} cannot be loaded ({words}); {remedy}"
    return None


@functools.cache
def cpu_absent() -> str | None:
    """Why the C++ kernels cannot run in this process, or None."""
    return _load("_C_cpu")


@functools.cache
def cuda_absent() -> str | None:
    """Why the CUDA kernels cannot run in this process, or None."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if (reason := _load("_C_cuda")) is not None:
        return reason
    if not torch.ops.fakd_ext.has_device_code():
        major, minor = torch.cuda.get_device_capability()
        return (
            f"the compiled library _C_cuda holds no code for {torch.cuda.get_device_name()}; "
            f"reinstall with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    return None


def cpu_isa() -> str:
    """The C++ kernels' instructions: amx_bf16, avx512_bf16, avx512, avx2, neon or baseline."""
    return torch.ops.fakd_ext.isa()


def has_bfloat16_products(device: torch.device) -> bool:
    """Whether the C++ engine multiplies bfloat16 matrices as such, several times faster."""
    is_served = device.type == "cpu" and cpu_absent() is None
    return is_served and torch.ops.fakd_ext.has_bfloat16_products()
