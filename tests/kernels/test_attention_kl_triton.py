"""The Triton engine of attention_kl in Triton's interpreter, on a CPU, against the oracle.

Run as `TRITON_INTERPRET=1 pytest tests/kernels/test_attention_kl_triton.py`: Triton reads the
variable when it is first imported, so the whole process must have it.
"""

import itertools
import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1 in the environment of the process", allow_module_level=True
    )
pytest.importorskip("triton")

from fakd_kernels import _triton, explain
from fakd_kernels.ops.attention_kl import dispatch, triton_kernel
from fakd_kernels.ops.attention_kl.triton_kernel import mean, tiles
from fakd_kernels.ops.attention_kl.triton_kernel.rows import meeting_rows
from tests.support.attention_cases import CASES, CASES_BY_ID, AttentionCase, make_inputs
from tests.support.attention_checks import check, results
from tests.support.interpreter import prepare_once

prepare_once()
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {"f32": (F32, F32), "bf16": (BF16, BF16), "f16": (F16, F16), "bf16-f32": (BF16, F32)}
DISTANCES = ("kl", "reverse_kl", "jsd", "mse")
pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    # numpy's, of elements that a mask takes off afterwards
    pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning"),
]
# Several tiles, padding and shared keys in as few programs as can be.
SMALL = AttentionCase("", "", ((1, 37, (2, 1, 16), (2, 2, 16)),), "left", options={"causal": True})
# Widths of several pieces, and of several steps and parts of the gradient.
WIDE = AttentionCase("wide", "", ((1, 20, (2, 1, 80), (2, 2, 96)),), options={"causal": True})


def rows():
    """Every case by kl in float32; the others where a kernel would tell them apart."""
    for case in CASES:
        if case.id not in ("blocks", "mean-blocks"):  # see test_many_tiles and the one on strips
            yield case, "f32", "kl"
    for case, distance in itertools.product(
        ("gqa", "spread", "left", "softcap", "mean", "one-token"), DISTANCES[1:]
    ):
        yield CASES_BY_ID[case], "f32", distance
    for case, dtypes in itertools.product(("gqa", "float", "mean"), ("bf16", "f16", "bf16-f32")):
        yield CASES_BY_ID[case], dtypes, "kl"
    yield CASES_BY_ID["softcap"], "bf16", "jsd"
    yield CASES_BY_ID["ragged"], "bf16-f32", "reverse_kl"
    yield CASES_BY_ID["one-wide"], "f16", "mse"
    for dtypes in DTYPES:
        yield WIDE, dtypes, "kl"


@pytest.mark.parametrize(
    ("case", "dtypes", "distance"),
    [pytest.param(*row, id=f"{row[0].id}-{row[1]}-{row[2]}") for row in rows()],
)
def test_value_and_gradients(case, dtypes, distance):
    check(make_inputs(case, *DTYPES[dtypes]), "triton", distance=distance)


def test_many_tiles():
    case = AttentionCase("", "", ((1, 260, (1, 1, 16), (1, 1, 16)),), options={"window": 100})
    check(make_inputs(case), "triton")


@pytest.mark.parametrize("apart", [1e-2, 1e-3])
@pytest.mark.parametrize("distance", DISTANCES)
def test_near_equal_sides(apart, distance):
    case = AttentionCase("", "", ((1, 40, (2, 2, 16), (2, 2, 16)),), is_equal=True)
    inputs = make_inputs(case, seed=1)  # of 0, eager's one number is right by luck
    generator = torch.Generator().manual_seed(1)
    inputs.tensors[2:] = [
        [t.detach() + apart * torch.randn(t.shape, generator=generator) for t in group]
        for group in inputs.tensors[:2]
    ]
    check(inputs, "triton", distance=distance)


@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_sides_give_exactly_nothing(heads, distance):
    inputs = make_inputs(
        AttentionCase("", "", ((1, 40, (2, 2, 16), (2, 2, 16)),), is_equal=True), BF16
    )
    got = results(inputs, reference=False, engine="triton", distance=distance, heads=heads)
    assert got["loss"].item() == 0
    assert all((got[name] == 0).all() for name in inputs.leaves)


def launches_of(inputs, **options) -> list[str]:
    with _triton.record_launches() as launches:
        inputs.call(engine="triton", **options)
    return [name for name, _ in launches]


MATCH = ["forward_kernel", "gradient_kernel", "gradient_kernel", "reduce_kernel"]
MEAN = ["sums_kernel", "map_kernel", "center_kernel", "gradient_kernel", "gradient_kernel"]


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(("heads", "expected"), [("match", MATCH), ("mean", [*MEAN, MATCH[-1]])])
def test_launches_do_not_grow_with_the_number_of_pairs(count, heads, expected):
    shape = (2, 2, 16), (2, 2, 16)
    pairs = tuple((1 + index % 2, 7 + index, *shape) for index in range(count))
    assert launches_of(make_inputs(AttentionCase("", "", pairs)), heads=heads) == expected


def test_shared_keys_take_one_launch_more():
    inputs = make_inputs(CASES_BY_ID["gqa"])
    assert launches_of(inputs) == [*MATCH[:3], "group_kernel", MATCH[3]]


@pytest.mark.parametrize("distance", ["kl", "jsd"])
@pytest.mark.parametrize(("heads", "kernels"), [("match", MATCH[:1]), ("mean", MEAN[:2])])
def test_values_alone_without_gradients(heads, kernels, distance):
    inputs = make_inputs(SMALL)
    options = {"heads": heads, "distance": distance}
    learned = inputs.call(engine="triton", **options).loss
    with torch.no_grad():
        names = launches_of(inputs, **options)
        assert torch.equal(inputs.call(engine="triton", **options).loss, learned)
    assert sorted({*names}) == sorted({*kernels, "reduce_kernel"})


@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_only_wanted_gradients_are_computed(frozen, heads):
    inputs = make_inputs(SMALL)
    inputs.tensors[frozen][0].requires_grad_(False)
    check(inputs, "triton", heads=heads)
    assert launches_of(inputs, heads=heads).count("gradient_kernel") == 1


@pytest.mark.parametrize("heads", ["match", "mean"])
def test_equal_bits_every_run(heads):
    inputs = make_inputs(replace(SMALL, mask="float"), BF16)
    first, second = (
        results(inputs, reference=False, engine="triton", heads=heads) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("heads", ["match", "mean"])
def test_masked_tokens_have_no_effect(heads, value):
    clean, hostile = (make_inputs(replace(SMALL, mask="holes")) for _ in range(2))
    away = ~hostile.mask[0][:, None, :, None]
    with torch.no_grad():
        for group in hostile.tensors:
            group[0].masked_fill_(away, value)
    want, got = (
        results(inputs, reference=False, engine="triton", heads=heads)
        for inputs in (clean, hostile)
    )
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("place", range(4))
def test_nan_reaches_the_loss(place, heads):
    inputs = make_inputs(SMALL)
    with torch.no_grad():
        inputs.tensors[place][0][0, 0, 12, 3] = torch.nan
    assert inputs.call(engine="triton", heads=heads).loss.isnan()


@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_strips_of_averaged_maps(dtypes, monkeypatch):
    """Strips of 128 query rows, two of a pair: dK accumulates over them."""
    monkeypatch.setattr(mean, "CHUNK_BYTES", 1)
    pairs = ((1, 150, (2, 1, 16), (3, 3, 16)), (1, 9, (2, 2, 16), (2, 2, 16)))
    case = AttentionCase("", "", pairs, mask="left", options={"heads": "mean", "window": 90})
    inputs = make_inputs(case, *DTYPES[dtypes])
    assert launches_of(inputs).count("map_kernel") == 3
    check(inputs, "triton")


def visited(tokens: int, causal: bool, window: int | None) -> int:
    """Tiles of 128 x 64 that the kernels visit."""
    back = tokens if window is None else window - 1
    ahead = 0 if causal else back
    count = 0
    for begin in range(0, tokens, 128):
        first, last = meeting_rows.fn(begin, begin + 128, 0, tokens, back, ahead)
        count += tiles.count_blocks(last - first, 64)
    return count


def test_causal_and_windowed_tiles_are_skipped():
    whole = visited(4096, False, None)
    assert whole == 32 * 64
    assert visited(4096, True, None) == (whole + 32 * 2) // 2
    assert visited(4096, True, 256) == 2 + 4 + 30 * 6
    assert visited(8192, False, 256) <= 2.1 * visited(4096, False, 256)


@pytest.mark.parametrize("own", ["q", "k"])
def test_meeting_rows_are_all_and_no_more(own):
    for begin, end, causal, window in itertools.product(
        (0, 5, 30), (8, 33, 40), (True, False), (None, 1, 4, 100)
    ):
        if begin >= end:
            continue
        tokens, back = 37, 37 if window is None else window - 1
        ahead = 0 if causal else back
        reach = (back, ahead) if own == "q" else (ahead, back)
        first, last = meeting_rows.fn(begin, end, 0, tokens, *reach)
        met = {
            other
            for row in range(begin, min(end, tokens))
            for other in range(tokens)
            if -reach[0] <= other - row <= reach[1]
        }
        assert first == min(met)
        assert last == max(met) + 1


def test_neighbours_of_a_gradient_are_not_touched(monkeypatch):
    """The gradient buffers lie between sentinels, as slices of a larger tensor."""
    inputs = make_inputs(AttentionCase("", "", ((1, 13, (2, 1, 20), (2, 2, 16)),)))
    margin, wholes = 64, []

    def inside(grad):
        wholes.append(torch.full((grad.numel() + 2 * margin,), 7.0))
        return wholes[-1][margin:-margin].view(grad.shape)

    def fill(problem):
        (pair,) = problem.pairs
        pair = replace(pair, grad_q=inside(pair.grad_q), grad_k=inside(pair.grad_k))
        triton_kernel.fill(replace(problem, pairs=[pair]))

    monkeypatch.setitem(dispatch.FILL, "triton", fill)
    inputs.call(engine="triton")
    for whole in wholes:
        assert (whole[:margin] == 7).all()
        assert (whole[-margin:] == 7).all()
        assert (whole[margin:-margin] != 7).all()


def test_offsets_past_32_bits():
    """A head begins 2^31 elements after the one before; memory between them is never touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    inputs = make_inputs(AttentionCase("", "", ((1, 6, (2, 2, 16), (2, 2, 16)),)), BF16)
    want = results(inputs, reference=False, engine="triton")
    storage = torch.empty(2**31 + 6 * 16, dtype=BF16)
    far = storage.as_strided((1, 2, 6, 16), (0, 2**31, 16, 1))
    for place in (0, 1):
        far.copy_(inputs.tensors[place][0].detach())
        moved = replace(inputs, tensors=[list(group) for group in inputs.tensors])
        moved.tensors[place][0] = far.detach().requires_grad_()
        got = results(moved, reference=False, engine="triton")
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_refusals_in_words():
    inputs = make_inputs(CASES_BY_ID["plain"])
    with pytest.raises(RuntimeError, match="float64 is served by the reference engine only"):
        inputs.double().call(engine="triton")
    wide = make_inputs(AttentionCase("", "", ((1, 3, (1, 1, 300), (1, 1, 8)),)))
    with pytest.raises(RuntimeError, match="heads up to 128 wide: got 300"):
        wide.call(engine="triton")
    inputs.tensors[2][0] = inputs.tensors[2][0].half()
    with pytest.raises(RuntimeError, match="queries and keys of one dtype"):
        inputs.call(engine="triton")


def test_explain_says_who_serves():
    inputs = make_inputs(CASES_BY_ID["plain"])
    words = explain("attention_kl", *inputs.tensors, engine="triton")
    assert words.startswith("attention_kl: served by the triton engine.")
