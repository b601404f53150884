"""The Triton kernels of logit_kl, linear_kl and topk_kl compiled for cards that are not here.

Variants that the launchers would choose for real sizes are compiled for each architecture, by the
functions that the launchers themselves call. Asserted: no register spills, shared memory within the
card's limit, loads of 16 bytes wherever rows are aligned. Needs no card, but a process without
TRITON_INTERPRET.
"""

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

from benchmarks.aot import CUOBJDUMP, SHARED_BYTES
from benchmarks.variants import row_form
from fakd_kernels import _triton_outputs as outputs
from fakd_kernels.ops.topk_kl.triton_kernel import launch as top
from fakd_kernels.ops.topk_kl.triton_kernel.kernel import TopForm
from tests.support.aot import check

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _needs_cuobjdump():
    if not CUOBJDUMP.exists():
        pytest.skip(f"this Triton brings no {CUOBJDUMP.name}")


def loads(ptx: str) -> list[str]:
    return re.findall(r"ld\.global\S*", ptx)


# At a step of occupancy, such as 128 registers, ptxas sometimes keeps one pointer on the stack,
# outside every loop, rather than take one register more.
ONE_POINTER, TWO_POINTERS = 8, 16
# Of one side's logits, 16 entries a thread: this many loads of 16 bytes, sweeps left out.
VECTORS = {F32: 4, BF16: 2, F16: 2}


@pytest.mark.parametrize("distance", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_rows_fit_and_load_16_bytes(capability, distance, tmp_path):
    for vocab, dtype, is_full in (
        (128256, BF16, False),
        (128256, F32, True),
        (4096, BF16, True),
        (4096, F32, False),
    ):
        form = row_form(distance, vocab, is_full)
        variant = outputs.rows_variant(form, vocab, *[dtype] * 5)
        name = f"{distance}, {vocab} entries, {dtype}, full: {is_full}"
        compiled = check(name, variant, capability, tmp_path, ONE_POINTER)
        found = loads(compiled.asm["ptx"])
        sweeps = (3 if distance == "jsd" else 2) if form.is_wide else 1
        vectors = [load for load in found if ".v4" in load]
        assert len(vectors) == 2 * sweeps * VECTORS[dtype], f"{name}: narrow loads"


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_rows_of_linear_kl(capability, tmp_path):
    """Logits in float32, their gradient in bfloat16; and values alone."""
    for is_full in (False, True):
        form = row_form("kl", 151936, is_full)
        variant = outputs.rows_variant(form, 151936, F32, F32, BF16, BF16, BF16)
        compiled = check(f"linear, full: {is_full}", variant, capability, tmp_path)
        assert re.search(r"st\.global\S*\.v4", compiled.asm["ptx"])
        values = outputs.rows_variant(form._replace(wants_grad=False), 151936, F32, F32)
        check(f"linear, values, full: {is_full}", values, capability, tmp_path, TWO_POINTERS)


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_classifiers_and_unaligned_rows(capability, tmp_path):
    for vocab, dtype in ((2, F32), (8, BF16), (1000, F16), (50257, BF16), (50257, F32)):
        form = row_form("kl", vocab, is_full=False, has_labels=True, is_aligned=False)
        variant = outputs.rows_variant(form, vocab, *[dtype] * 3)
        check(f"{vocab} entries, {dtype}", variant, capability, tmp_path)
    form = row_form("jsd", 8, is_full=True)
    variant = outputs.rows_variant(form, 8, *[F32] * 5)
    check("8 entries", variant, capability, tmp_path, ONE_POINTER)
    check("reduce", outputs.reduce_variant(), capability, tmp_path)


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_stored_entries(capability, tmp_path):
    plain, full = (TopForm(True, True, *[flag] * 4, True, False) for flag in (False, True))
    for name, form, vocab, entries, dtype in (
        ("ghost", plain, 128256, 64, BF16),
        ("no ghost", plain._replace(has_ghost=False), 128256, 64, BF16),
        ("all", full, 128256, 64, F32),
        ("many entries", full, 128256, 4096, F32),
        ("small vocabulary", full, 100, 8, F32),
        ("values", full._replace(wants_grad=False), 128256, 64, F32),
    ):
        variant = top.rows_variant(form, vocab, entries, dtype, dtype)
        ptx = check(name, variant, capability, tmp_path).asm["ptx"]
        sweeps = 0 if name == "no ghost" else 2 if form.wants_grad else 1
        vectors = [load for load in loads(ptx) if ".v4" in load]
        assert len(vectors) == sweeps * VECTORS[F32] or vocab == 100, f"{name}: narrow loads"
