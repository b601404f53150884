"""`FeatureAlignmentLoss`: what it owns, what it computes, what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fakd import FeatureAlignmentLoss


def hiddens(dims, rows=(2, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*rows, dim, generator=generator) for dim in dims]


def by_hand(loss, students, teachers, mask):
    """The formula, pair by pair."""
    total = 0
    weights = loss.pair_weights or [1 / loss.pairs] * loss.pairs
    for index, (x, t) in enumerate(zip(students, teachers, strict=True)):
        p = loss.projections[0 if loss.projection == "shared" else index](x)
        cosine = (1 - F.cosine_similarity(p, t, dim=-1))[mask].mean()
        if loss.euclidean == "squared":
            euclidean = (p - t).square().mean(-1)[mask].mean()
        else:
            euclidean = (p - t).norm(dim=-1)[mask].mean()
        term = loss.cosine_weight * cosine + loss.euclidean_weight * euclidean
        total = total + weights[index] * term
    return total


@pytest.mark.parametrize(
    ("student_dims", "teacher_dims", "options"),
    [
        ([8, 8], [12, 12], {}),
        ([8, 12], [12, 12], {}),
        ([8, 8], [8, 8], {"projection": "per_pair", "init": "xavier"}),
        ([8, 8], [12, 12], {"projection": "shared", "bias": False}),
        ([6, 7], [6, 7], {"projection": "none", "euclidean": "distance"}),
        ([8, 8], [5, 9], {"pair_weights": [0.2, 2.0], "cosine_weight": 0.3}),
        ([8, 8], [5, 9], {"euclidean_weight": 0.0}),
    ],
)
def test_value_and_gradients(student_dims, teacher_dims, options):
    torch.manual_seed(0)
    loss = FeatureAlignmentLoss(student_dims, teacher_dims, **options)
    students = [x.requires_grad_() for x in hiddens(student_dims)]
    teachers = hiddens(teacher_dims, seed=1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    leaves = [*students, *loss.parameters()]
    expected = by_hand(loss, students, teachers, mask)
    result = loss(students, teachers, mask)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(result.loss, leaves), torch.autograd.grad(expected, leaves)
    )


def test_normalizer_replaces_the_token_count():
    loss = FeatureAlignmentLoss(8, 12)
    students, teachers = hiddens([8]), hiddens([12])
    halved = loss(students, teachers, normalizer=20).loss
    torch.testing.assert_close(halved, loss(students, teachers).loss / 2)


@pytest.mark.parametrize(
    ("student_dims", "projection", "kinds"),
    [
        ([8, 12], "auto", [nn.Linear, nn.Identity]),
        ([8, 12], "per_pair", [nn.Linear, nn.Linear]),
        ([8, 8], "shared", [nn.Linear]),
        ([12, 12], "none", [nn.Identity, nn.Identity]),
    ],
)
def test_which_pairs_are_projected(student_dims, projection, kinds):
    loss = FeatureAlignmentLoss(student_dims, 12, projection=projection)
    assert [type(module) for module in loss.projections] == kinds


def test_numbers_serve_every_pair():
    loss = FeatureAlignmentLoss(8, 12, 3)
    assert loss.pairs == 3
    assert loss.student_dims == [8] * 3
    assert [tuple(module.weight.shape) for module in loss.projections] == [(12, 8)] * 3


def test_inits():
    orthogonal = FeatureAlignmentLoss(8, 12).projections[0]
    torch.testing.assert_close(orthogonal.weight.T @ orthogonal.weight, torch.eye(8))
    assert not orthogonal.bias.any()
    identity = FeatureAlignmentLoss(8, 12, init="identity").projections[0]
    assert torch.equal(identity.weight, torch.eye(12, 8))
    assert not FeatureAlignmentLoss(8, 12, init="zeros").projections[0].weight.any()
    torch.manual_seed(0)
    xavier = FeatureAlignmentLoss(8, 12, init="xavier").projections[0].weight
    assert 0 < xavier.abs().max() <= (6 / 20) ** 0.5


def test_state_dict_names_are_the_pairs():
    names = FeatureAlignmentLoss([12, 8], 12).state_dict().keys()
    assert list(names) == ["projections.1.weight", "projections.1.bias"]


def test_projections_learn():
    torch.manual_seed(0)
    loss = FeatureAlignmentLoss(8, 12)
    students = hiddens([8], (64,))
    teachers = [students[0] @ torch.randn(8, 12) + 1.0]
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    values = []
    for _ in range(200):
        optimizer.zero_grad()
        value = loss(students, teachers).loss
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.01 * values[0]


def test_learned_weights_balance_and_do_not_sink():
    loss = FeatureAlignmentLoss(12, 12, learn_weights=True)
    students, teachers = hiddens([12]), [10 * x for x in hiddens([12], seed=1)]
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        loss(students, teachers).loss.backward()
        optimizer.step()
    logs = loss.logs(loss(students, teachers))
    # At the optimum of exp(-s) L + s, the weighted term is 1.
    assert float(logs["weighted_cosine"]) == pytest.approx(1, abs=0.02)
    assert float(logs["weighted_euclidean"]) == pytest.approx(1, abs=0.02)
    assert float(logs["cosine_weight"]) > float(logs["euclidean_weight"]) > 0


def test_logs_add_up():
    loss = FeatureAlignmentLoss([8, 8], 12, cosine_weight=0.5, euclidean_weight=2.0)
    result = loss(hiddens([8, 8]), hiddens([12, 12], seed=1))
    logs = loss.logs(result)
    torch.testing.assert_close(logs["weighted_cosine"] + logs["weighted_euclidean"], result.loss)
    torch.testing.assert_close(logs["cosine"], result.cosine.mean())
    torch.testing.assert_close(logs["weighted_euclidean"], 2.0 * result.euclidean.mean())
    assert not any(value.requires_grad for value in logs.values())


def test_reads_well():
    loss = FeatureAlignmentLoss(8, 12, 2, euclidean_weight=0.5)
    assert loss.extra_repr() == (
        "2 x 8->12, projection=auto, init=orthogonal, cosine_weight=1, "
        "euclidean_weight=0.5 (squared)"
    )
    assert "8->12, 12->12, " in FeatureAlignmentLoss([8, 12], 12).extra_repr()


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (([8, 8], [12]), {}, r"agree on the number of pairs: got \[1, 2\]"),
        ((8, [12, 12], 3), {}, r"got \[2, 3\]"),
        (([], []), {}, "at least one layer pair"),
        ((0, 12), {}, "student_dims must be positive integers: got 0"),
        ((8, [12.0]), {}, "teacher_dims must be positive integers: got 12.0"),
        ((8, 12), {"projection": "none"}, r"got 8 \(student\) and 12 \(teacher\) in pair 0"),
        (([8, 9], 12), {"projection": "shared"}, "must serve pairs of equal widths"),
        ((8, 12), {"projection": "own"}, "projection must be one of 'auto', .*: got 'own'"),
        ((8, 12), {"init": "random"}, "init must be one of 'orthogonal'"),
        ((8, 12), {"euclidean": "l2"}, "euclidean must be one of 'squared', 'distance'"),
        ((8, 12), {"cosine_weight": -1.0}, "cosine_weight must be a finite number >= 0: got -1"),
        ((8, 12), {"euclidean_weight": float("nan")}, "euclidean_weight must be a finite number"),
        ((8, 12), {"cosine_weight": 0, "euclidean_weight": 0}, "must not both be 0"),
        ((8, 12), {"pair_weights": [1, 2]}, "pair_weights must have one entry per layer pair"),
        ((8, 12), {"pair_weights": [-1]}, r"pair_weights\[0\] must be a finite number >= 0"),
    ],
)
def test_impossible_settings(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        FeatureAlignmentLoss(*arguments, **options)


def test_impossible_inputs():
    loss = FeatureAlignmentLoss(8, 12, 2)
    with pytest.raises(ValueError, match=r"student_hiddens must have one entry .* got 1 for 2"):
        loss(hiddens([8]), hiddens([12, 12]))
    with pytest.raises(ValueError, match=r"teacher_hiddens\[1\] must be 12 wide"):
        loss(hiddens([8, 8]), hiddens([12, 11]))
    with pytest.raises(TypeError, match="student_hiddens must be a list of tensors"):
        loss(hiddens([8])[0], hiddens([12, 12]))
    with pytest.raises(ValueError, match="one weight per token"):
        loss(hiddens([8, 8]), hiddens([12, 12]), torch.ones(2, 4, dtype=torch.bool))
