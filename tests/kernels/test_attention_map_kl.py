"""attention_map_kl on the reference and C++ engines, against the float64 formula."""

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from fakd_kernels import attention_kl, attention_map_kl, explain
from fakd_kernels.ops.attention_map_kl import attention_map_kl_reference
from tests.support.accuracy import assert_accurate

ENGINES = ("reference", "cpu")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {"f32": (F32, F32), "bf16": (BF16, BF16), "f16": (F16, F16), "bf16-f32": (BF16, F32)}
DISTANCES = ("kl", "reverse_kl", "jsd", "mse")
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@dataclass(frozen=True)
class MapCase:
    """One call; a pair is (B, T, H student, H teacher)."""

    id: str
    why: str
    pairs: tuple = ((2, 37, 3, 3),)
    mask: str = "none"
    spread: float = 1.0
    is_equal: bool = False
    options: dict = field(default_factory=dict)


CASES = (
    MapCase("plain", "an odd size"),
    MapCase("aligned", "whole vectors", ((1, 64, 2, 2),)),
    MapCase("one-token", "a single key", ((3, 1, 2, 2),)),
    MapCase("causal", "keys up to the query", ((2, 41, 3, 3),), options={"causal": True}),
    MapCase("window", "keys on both sides", options={"window": 5}),
    MapCase("holes", "masked tokens anywhere", mask="holes", options={"causal": True}),
    MapCase("float", "row weights", mask="float"),
    MapCase("zeros", "nothing counts: loss 0", mask="zeros"),
    MapCase("spread", "probabilities that underflow", spread=30.0),
    MapCase("heads", "a teacher head of each head", ((2, 9, 3, 5),), options={"heads": [4, 0, 0]}),
    MapCase("mean", "heads averaged", ((2, 19, 4, 6),), "float", options={"heads": "mean"}),
    MapCase("mean-spread", "likewise, far apart", ((1, 70, 2, 3),), "none", 30.0, False,
            {"heads": "mean"}),
    MapCase("equal", "student = teacher", ((4, 64, 3, 3),), is_equal=True),
    MapCase("ragged", "pairs differ in every size", ((2, 17, 4, 4), (1, 50, 2, 2), (3, 5, 1, 1)),
            options={"weight": 0.7, "pair_weights": [0.5, 2.0, 1.0]}),
)  # fmt: skip
CASES_BY_ID = {case.id: case for case in CASES}


def make(case, inputs, dtypes=(F32, F32)):
    generator = torch.Generator().manual_seed(0)
    students, teachers, masks = [], [], []
    for batch, tokens, *heads in case.pairs:
        maps = [
            torch.randn(batch, count, tokens, tokens, generator=generator) * case.spread
            for count in heads
        ]
        if case.is_equal:
            maps[1] = maps[0]
        if inputs == "probabilities":
            maps = [torch.softmax(scores, -1) for scores in maps]
        students.append(maps[0].to(dtypes[0]).requires_grad_())
        teachers.append(maps[1].to(dtypes[1]))
        uniform = torch.rand(batch, tokens, generator=generator)
        masks.append(
            {
                "none": None,
                "holes": uniform > 0.4,
                "float": torch.where(uniform > 0.3, uniform, 0),
                "zeros": torch.zeros(batch, tokens, dtype=torch.bool),
            }[case.mask]
        )
    return students, teachers, masks


def results(students, teachers, masks, options, engine=None):
    if engine is None:
        pair_weights = [1 / len(students)] * len(students)
        loss, per_pair, per_head = attention_map_kl_reference(
            students, teachers, masks, **{"pair_weights": pair_weights} | options
        )
    else:
        result = attention_map_kl(students, teachers, mask=masks, engine=engine, **options)
        loss, per_pair, per_head = result.loss, result.per_pair, result.per_head
    # A power of two: gradients in half precision are rounded once, as eager's are.
    grads = torch.autograd.grad(2 * loss, students)
    return {
        "loss": loss,
        "per_pair": per_pair,
        **{f"per_head[{index}]": value for index, value in enumerate(per_head)},
        **{f"grad[{index}]": value for index, value in enumerate(grads)},
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
@pytest.mark.parametrize(
    ("engine", "dtypes"), [(engine, dtypes) for engine in ENGINES for dtypes in DTYPES]
)
def test_value_and_gradients(case, inputs, engine, dtypes):
    students, teachers, masks = make(case, inputs, DTYPES[dtypes])
    double = [s.detach().double().requires_grad_() for s in students]
    for distance in DISTANCES:
        options = {"inputs": inputs, "distance": distance} | case.options
        truth = results(double, [t.double() for t in teachers], masks, options)
        eager = results(students, teachers, masks, options)
        got = results(students, teachers, masks, options, engine)
        for name, value in got.items():
            dtype = students[0].dtype if name.startswith("grad") else F32
            assert value.dtype == dtype
            assert_accurate(f"{distance} {name}", value, truth[name], eager[name], dtype)


@pytest.mark.parametrize("engine", ENGINES)
def test_agrees_with_attention_kl(engine):
    q, k = (torch.randn(2, 3, 20, 8) for _ in range(2))
    teacher_q, teacher_k = (torch.randn(2, 3, 20, 16) for _ in range(2))
    student, teacher = q @ k.mT / 8**0.5, teacher_q @ teacher_k.mT / 4
    want = attention_kl(q, k, teacher_q, teacher_k, causal=True)
    options = {"causal": True, "engine": engine}
    for got in (
        attention_map_kl(student, teacher, inputs="scores", **options),
        attention_map_kl(
            *[s.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf).softmax(-1)
              for s in (student, teacher)], **options
        ),
    ):  # fmt: skip
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.per_head, want.per_head)


@pytest.mark.parametrize("engine", ENGINES)
def test_masked_scores_may_be_minus_infinity(engine):
    """As models hand over scores to which they have added a mask."""
    away = torch.ones(12, 12).triu(1).bool()
    student, teacher = (torch.randn(1, 2, 12, 12) for _ in range(2))
    want = attention_map_kl(student, teacher, inputs="scores", causal=True).loss
    if engine == "cpu":
        for low in (-torch.inf, torch.finfo(F32).min):
            maps = [s.masked_fill(away, low).requires_grad_() for s in (student, teacher)]
            got = attention_map_kl(*maps, inputs="scores", engine=engine).loss
            torch.testing.assert_close(got, want)
            assert torch.autograd.grad(got, maps[0])[0].isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("heads", ["match", "mean"])
def test_scores_that_are_all_minus_infinity_have_no_probabilities(engine, heads):
    maps = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    maps[0][0, 1, 2] = -torch.inf
    for student, teacher in (maps, maps[::-1]):
        options = {"inputs": "scores", "heads": heads, "engine": engine}
        assert attention_map_kl(student, teacher, **options).loss.isnan()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("distance", ["kl", "reverse_kl", "jsd"])
def test_averages_of_probabilities_however_small(engine, distance):
    """What one side alone excludes, as models do, by adding a large negative number."""
    maps = torch.randn(2, 1, 2, 5, 5, dtype=torch.float64).unbind()
    maps[0][..., 0] = -1e4
    for student, teacher in (maps, maps[::-1]):
        log_s, log_t = (
            (maps.log_softmax(-1).logsumexp(1) - math.log(2)) for maps in (student, teacher)
        )
        middle = torch.logaddexp(log_s, log_t) - math.log(2)
        want = {
            "kl": F.kl_div(log_s, log_t, log_target=True, reduction="none"),
            "reverse_kl": F.kl_div(log_t, log_s, log_target=True, reduction="none"),
            "jsd": sum(
                F.kl_div(middle, log, log_target=True, reduction="none") / 2
                for log in (log_s, log_t)
            ),
        }[distance]
        options = {"inputs": "scores", "heads": "mean", "distance": distance, "engine": engine}
        got = attention_map_kl(student.float(), teacher.float(), **options).loss
        torch.testing.assert_close(got, want.sum(-1).mean().float())


# Scores of which the second excludes what the first believes in, and their divergence.
EXCLUDED = (torch.tensor([1.0, 2, 0]), torch.tensor([0.5, -torch.inf, 1]), 0.349464)


def check_excluded_keys(engine, heads):
    """The part of the side that does not exclude the key stays in the jsd, whichever side it is."""
    maps = [scores.expand(1, 2, 3, 3) for scores in EXCLUDED[:2]]
    for student, teacher in (maps, maps[::-1]):
        student = student.clone().requires_grad_()
        options = {"inputs": "scores", "distance": "jsd", "heads": heads, "engine": engine}
        loss = attention_map_kl(student, teacher, **options).loss
        torch.testing.assert_close(loss, torch.tensor(EXCLUDED[2]), rtol=1e-5, atol=0)
        assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("heads", ["match", "mean"])
def test_jsd_of_keys_that_one_side_excludes(engine, heads):
    check_excluded_keys(engine, heads)


@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck_of_the_reference_engine(inputs, heads, distance):
    students, teachers, masks = make(MapCase("", "", ((1, 5, 2, 2),), "float"), inputs)
    students = [s.detach().double().requires_grad_() for s in students]
    teachers = [t.double() for t in teachers]

    def loss(*maps):
        options = {"inputs": inputs, "heads": heads, "distance": distance, "causal": True}
        return attention_map_kl(list(maps), teachers, mask=masks, **options).loss

    assert torch.autograd.gradcheck(loss, students)


def test_masked_rows_are_not_read():
    students, teachers, masks = make(CASES_BY_ID["holes"], "scores")
    want = results(students, teachers, masks, {"inputs": "scores"}, "cpu")
    away = ~masks[0]
    away = away[:, None, :, None] | away[:, None, None, :]
    with torch.no_grad():
        students[0].masked_fill_(away, torch.nan)
    got = results(students, teachers, masks, {"inputs": "scores"}, "cpu")
    for name, value in got.items():
        torch.testing.assert_close(value, want[name])


_MAPS = torch.full((2, 3, 6, 6), 1 / 6)
BAD_CALLS = {
    "rank": ((_MAPS[0], _MAPS), {}, ValueError, r"student_maps\[0\] must have the shape \[B, H"),
    "square": ((_MAPS[..., :5], _MAPS), {}, ValueError, "as many keys as queries"),
    "tokens": ((_MAPS, _MAPS[..., :5, :5]), {}, ValueError, "batch and tokens of student_maps"),
    "heads": ((_MAPS, _MAPS[:, :2]), {}, ValueError, "got 3 .student. and 2 .teacher."),
    "inputs": ((_MAPS, _MAPS), {"inputs": "logits"}, ValueError, "inputs must be one of"),
    "temperature": ((_MAPS, _MAPS), {"temperature": 2.0}, ValueError, "must be 1 for inputs="),
    "mask": ((_MAPS, _MAPS), {"mask": torch.ones(2, 5).bool()}, ValueError, r"shape \[B, T\]"),
    "integers": ((_MAPS.int(), _MAPS), {}, TypeError, "got torch.int32"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_in_words(name):
    maps, options, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        attention_map_kl(*maps, **options)


def test_compiles_whole_and_explains():
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()

    def loss(student, teacher):
        return attention_map_kl(student, teacher, causal=True).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 11):
        student = torch.randn(2, 2, tokens, tokens).softmax(-1).requires_grad_()
        teacher = torch.randn(2, 2, tokens, tokens).softmax(-1)
        got, want = (torch.autograd.grad(f(student, teacher), student) for f in (compiled, loss))
        torch.testing.assert_close(got, want)
    assert "served by the cpu engine" in explain("attention_map_kl", _MAPS, _MAPS)
