"""The Triton kernels of attention_map_kl compiled for cards that are not here.

Variants that the launcher would choose for real sizes are compiled for each architecture, by the
functions that the launcher itself calls. Asserted: next to no register spills, shared memory within
the card's limit, loads and stores of 16 bytes where rows are aligned. Needs no card, but a process
without TRITON_INTERPRET.
"""

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

from benchmarks.aot import CUOBJDUMP, SHARED_BYTES
from benchmarks.variants import map_variant
from fakd_kernels._triton_sums import reduce_variant
from tests.support.aot import check

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {
    "bf16": (BF16,) * 3,
    "f32": (F32,) * 3,
    "f16": (F16, F16, F32),
    "mixed": (BF16, F32, BF16),
}
KINDS = [(inputs, heads) for inputs in ("probabilities", "scores") for heads in ("match", "mean")]
# At a step of occupancy, such as 80 registers, ptxas sometimes keeps a few pointers on the stack
# rather than take one register more.
SOME_POINTERS = 24
AVERAGED_MSE = 88  # with products and sums apart, on sm_120
DISTANCES = ("kl", "reverse_kl", "jsd", "mse")


@pytest.fixture(autouse=True)
def _needs_cuobjdump():
    if not CUOBJDUMP.exists():
        pytest.skip(f"this Triton brings no {CUOBJDUMP.name}")


@pytest.mark.parametrize(("inputs", "heads"), KINDS)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_rows_fit_and_move_16_bytes(capability, inputs, heads, tmp_path):
    for distance in DISTANCES:
        # Long rows are the same code in larger blocks: one distance is enough.
        long_rows = ((4096, "bf16"),) if distance == "kl" else ()
        for tokens, dtypes in ((1024, "bf16"), (1024, "f32"), *long_rows):
            name = f"{inputs}, {heads}, {distance}, {tokens} tokens, {dtypes}"
            variant = map_variant(inputs, heads, distance, tokens, DTYPES[dtypes])
            spills = AVERAGED_MSE if (heads, distance) == ("mean", "mse") else SOME_POINTERS
            ptx = check(name, variant, capability, tmp_path, spills).asm["ptx"]
            assert re.search(r"ld\.global\S*\.v4", ptx), f"{name}: narrow loads"
            assert re.search(r"st\.global\S*\.v4", ptx), f"{name}: narrow stores"


@pytest.mark.parametrize(("inputs", "heads"), KINDS)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_short_long_and_unaligned_rows(capability, inputs, heads, tmp_path):
    for tokens, dtypes, count in (
        *((8, "bf16", 12), (64, "f16", 12), (197, "f32", 3), (256, "bf16", 12)),
        *((512, "mixed", 12), (1000, "bf16", 12), (8192, "bf16", 32), (8192, "f32", 12)),
    ):
        variant = map_variant(inputs, heads, "kl", tokens, DTYPES[dtypes], count)
        name = f"{inputs}, {heads}, {tokens} tokens, {dtypes}"
        check(name, variant, capability, tmp_path, SOME_POINTERS)


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_values_alone_and_sums(capability, tmp_path):
    for inputs, heads in KINDS:
        variant = map_variant(inputs, heads, "jsd", 1024, DTYPES["bf16"], has_grad=False)
        check(f"{inputs}, {heads}, values", variant, capability, tmp_path, SOME_POINTERS)
    check("sums", reduce_variant(16), capability, tmp_path)
