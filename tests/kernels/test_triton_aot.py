"""Triton kernels compiled for cards that are not here: what registers, memory and PTX tell.

Every variant that the launcher would choose for real sizes is compiled for each architecture, by
the functions that the launcher itself calls. Asserted: no register spills, shared memory within
the card's limit, 16-byte loads. Needs no card, but a process without TRITON_INTERPRET.
"""

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

from benchmarks.aot import CUOBJDUMP, SHARED_BYTES
from benchmarks.variants import LINES, row_variants
from fakd_kernels import _scale
from fakd_kernels.ops.feature_alignment.triton_kernel import variants
from tests.support.aot import check

DTYPES = {
    "fp32": (torch.float32,) * 3,
    "bf16": (torch.bfloat16,) * 3,
    "fp16": (torch.float16,) * 3,
    "bf16-fp32-fp32": (torch.bfloat16, torch.float32, torch.float32),
    "bf16-bf16-fp32": (torch.bfloat16, torch.bfloat16, torch.float32),
}
WIDTHS = (64, 768, 4096, 8192)  # four, two and one row of a tile; the last wider than a tile
FEW_WIDTHS = (768, 8192)
# Row kernels compute in float32 whatever they load, alike on every card.
ROW_KERNELS = [
    (capability, dtypes)
    for capability in SHARED_BYTES
    for dtypes in DTYPES
    if dtypes in ("fp32", "bf16") or capability == 90
]


# At a step of occupancy (56, 64, 80 registers) ptxas sometimes keeps one pointer of a row kernel on
# the stack across the float64 division, outside every loop, rather than take one register more.
ONE_POINTER = 8


@pytest.fixture(autouse=True)
def _needs_cuobjdump():
    if not CUOBJDUMP.exists():
        pytest.skip(f"this Triton brings no {CUOBJDUMP.name}")


@pytest.mark.parametrize(("capability", "dtypes"), ROW_KERNELS)
def test_row_kernels_fit_and_load_16_bytes(capability, dtypes, tmp_path):
    widths = WIDTHS if dtypes == "bf16" else FEW_WIDTHS
    for name, variant in row_variants(DTYPES[dtypes], widths, True, True):
        compiled = check(f"{name} {dtypes}", variant, capability, tmp_path, ONE_POINTER)
        assert re.search(r"ld\.global\S*\.v4", compiled.asm["ptx"]), f"{name}: narrow loads"


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_unaligned_rows_and_distance(capability, tmp_path):
    for name, variant in row_variants(DTYPES["bf16"], FEW_WIDTHS, False, False):
        check(f"{name}, unaligned", variant, capability, tmp_path, ONE_POINTER)


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_small_kernels_fit(capability, tmp_path):
    for name, variant in (
        ("reduce", variants.reduce_variant()),
        ("scale", _scale.scale_variant(LINES)),
    ):
        check(name, variant, capability, tmp_path)
