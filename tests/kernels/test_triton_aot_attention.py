"""The Triton kernels of attention_kl compiled for cards that are not here.

Every variant that the launcher would choose for real sizes is compiled for each architecture, by
the functions that the launcher itself calls. Asserted: no register spills for kl, shared memory
within the card's limit, tensor-core instructions and asynchronous copies in the variants. Needs no
card, but a process without TRITON_INTERPRET.
"""

import os
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

from benchmarks.aot import CUOBJDUMP, SHARED_BYTES, TENSOR_CORE
from benchmarks.variants import LINES, attention_form, match_variants, mean_variants
from fakd_kernels._triton import TL_DTYPES, Variant
from fakd_kernels._triton_sums import reduce_variant
from fakd_kernels.ops.attention_kl.triton_kernel import tiles, variants
from fakd_kernels.ops.attention_kl.triton_kernel.variants import Form
from tests.support.aot import check

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {"bf16": (BF16, BF16), "f16": (F16, F16), "f32": (F32, F32), "bf16-f32": (BF16, F32)}
# Student and teacher widths; 96 and 80 have two pieces. Float32 kernels are alike for all widths.
WIDTHS = {
    "bf16": ((64, 64), (64, 128), (128, 128), (32, 64), (96, 80)),
    "f16": ((64, 64), (128, 128)),
    "f32": ((64, 128), (32, 20)),
    "bf16-f32": ((64, 128),),
}


def make_form(dtypes: str, widths: tuple[int, int], **options) -> Form:
    return attention_form(DTYPES[dtypes], widths, **options)


@pytest.fixture(autouse=True)
def _needs_cuobjdump():
    if not CUOBJDUMP.exists():
        pytest.skip(f"this Triton brings no {CUOBJDUMP.name}")


# Tiles of kl spill nothing where they were chosen by what fits, for want of a card to time them. Of
# the others, and of those that were the fastest on a card, some keep this many bytes of a thread on
# its stack, which costs time and nothing else.
OTHER_SPILLS, TIMED_SPILLS = 88, 376
TIMED = (90,)


def check_products(
    named: Iterator[tuple[str, Variant]], words: str, capability: int, folder, spills: int = 0
):
    for name, variant in named:
        ptx = check(f"{name} {words}", variant, capability, folder, spills).asm["ptx"]
        assert TENSOR_CORE[capability] in ptx, f"{name} {words}: no {TENSOR_CORE[capability]}"
        assert "cp.async.c" in ptx, f"{name} {words}: operands are not copied asynchronously"


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_matched_heads(capability, dtypes, tmp_path):
    for widths in WIDTHS[dtypes]:
        form = make_form(dtypes, widths, has_weights=widths == (64, 64))
        named = match_variants(form, "kl", capability)
        spills = TIMED_SPILLS if capability in TIMED else 0
        check_products(named, f"{dtypes} {widths}", capability, tmp_path, spills)


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_tiles_to_be_tuned_fit(capability, place, monkeypatch, tmp_path):
    monkeypatch.setattr(tiles, "pick", lambda _, c: c[min(place, len(c) - 1)])
    form = make_form("bf16", (64, 128))
    for name, variant in match_variants(form, "kl", capability):
        check(f"{name}, candidate {place}", variant, capability, tmp_path, OTHER_SPILLS)


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_other_distances_weights_and_softcaps(capability, tmp_path):
    # Each width on an older and on a newer card: the others took a core 80 seconds.
    widths = (64, 64) if capability in (80, 100) else (128, 128)
    for distance, has_weights, softcap in (("jsd", True, 50.0), ("mse", True, None)):
        named = match_variants(
            make_form("bf16", widths, has_weights=has_weights, softcap=softcap),
            distance,
            capability,
        )
        check_products(named, f"{distance} {widths}", capability, tmp_path, OTHER_SPILLS)
    named = match_variants(
        make_form("f32", widths, has_weights=True, softcap=50.0), "jsd", capability
    )
    check_products(named, f"float32 jsd {widths}", capability, tmp_path, OTHER_SPILLS)


@pytest.mark.parametrize("dtypes", ["bf16", "f32"])
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_averaged_heads(capability, dtypes, tmp_path):
    for widths in ((64, 64), (64, 128)) if dtypes == "bf16" else ((64, 128),):
        named = mean_variants(make_form(dtypes, widths, has_weights=True), "kl", capability)
        spills = TIMED_SPILLS if capability in TIMED else OTHER_SPILLS
        check_products(named, f"{dtypes} {widths}", capability, tmp_path, spills)


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_small_kernels_and_unaligned_heads(capability, tmp_path):
    check("reduce", reduce_variant(LINES), capability, tmp_path)
    for dtype in (F32, BF16):
        parts = TL_DTYPES[dtype]
        group = variants.group_variant(parts, TL_DTYPES[F32], LINES)
        check(f"group {dtype}", group, capability, tmp_path)
    for name, variant in match_variants(make_form("bf16", (40, 20)), "kl", capability):
        check(f"{name}, unaligned", variant, capability, tmp_path)
