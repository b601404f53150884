"""The loss of hidden states."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fakd_kernels import FeatureAlignment, feature_alignment

from .shared import (
    check_choice,
    check_lengths,
    check_weight,
    checked_pair_weights,
    mean_over_pairs,
)

PROJECTIONS = ("auto", "per_pair", "shared", "none")
INITS = ("orthogonal", "xavier", "identity", "zeros")
EUCLIDEAN = ("squared", "distance")


class FeatureAlignmentLoss(nn.Module):
    """Align the student's hidden states with the teacher's, over all layer pairs in one call.

        p = projection_l(h_S)
        loss = sum_l pair_weight_l * mean(cosine_weight (1 - cos(p, h_T))
                                          + euclidean_weight distance(p, h_T))

    L_feat (weight beta) and L_dist (weight delta) of arXiv 2412.19449.

    Args:
        student_dims: features of the student's hidden states; a number serves every pair, a list
            holds one per pair.
        teacher_dims: likewise for the teacher.
        pairs: number of layer pairs; needed only if both widths are numbers (default 1).
        projection: "auto" projects where the widths differ; "per_pair" gives every pair its own
            projection; "shared" one to all pairs; "none" none, and the widths must be equal.
        bias: whether projections have one. Hidden states have a large constant part (the bias of
            the last LayerNorm), which a bias meets and a product does not.
        init: "orthogonal" | "xavier" | "identity" | "zeros", of the projection's weight; biases
            start at 0. Orthogonal is the default because it keeps lengths and angles: at the
            first step the loss measures the student, not the projection, and the gradient reaches
            the student undistorted. Zeros sends no gradient to the student in the first step.
        cosine_weight: beta, >= 0.
        euclidean_weight: delta, >= 0.
        euclidean: "squared", |p - t|^2 / Dt, or "distance", |p - t|.
        pair_weights: one per pair, >= 0; default 1 / L each.
        learn_weights: learn how to balance the two terms: weight exp(-s), with s added to the loss
            so that the weights cannot all sink to 0 (arXiv 1705.07115). Off by default.
        eps: > 0, under which norms are clamped.
        engine: None lets fakd_kernels choose; a name forces one.

    Raises:
        ValueError: widths, weights or choices that cannot be; lists of unequal length.
    """

    def __init__(
        self,
        student_dims: int | Sequence[int],
        teacher_dims: int | Sequence[int],
        pairs: int | None = None,
        *,
        projection: str = "auto",
        bias: bool = True,
        init: str = "orthogonal",
        cosine_weight: float = 1.0,
        euclidean_weight: float = 1.0,
        euclidean: str = "squared",
        pair_weights: Sequence[float] | None = None,
        learn_weights: bool = False,
        eps: float = 1e-8,
        engine: str | None = None,
    ) -> None:
        super().__init__()
        self.student_dims, self.teacher_dims = _widths(student_dims, teacher_dims, pairs)
        check_choice("projection", projection, PROJECTIONS)
        check_choice("init", init, INITS)
        check_choice("euclidean", euclidean, EUCLIDEAN)
        check_weight("cosine_weight", cosine_weight)
        check_weight("euclidean_weight", euclidean_weight)
        if cosine_weight == 0 and euclidean_weight == 0:
            raise ValueError(
                "cosine_weight and euclidean_weight must not both be 0: got a loss that is always "
                "0; raise one of them."
            )
        self.projection = projection
        self.init = init
        self.cosine_weight = float(cosine_weight)
        self.euclidean_weight = float(euclidean_weight)
        self.euclidean = euclidean
        self.pair_weights = checked_pair_weights(pair_weights, self.pairs)
        self.eps = eps
        self.engine = engine
        self.projections = nn.ModuleList(self._make_projections(bias))
        # s of the cosine and of the Euclidean term.
        self.log_weights = nn.Parameter(torch.zeros(2)) if learn_weights else None
        self.reset_parameters()

    @property
    def pairs(self) -> int:
        """The number of layer pairs."""
        return len(self.student_dims)

    def reset_parameters(self) -> None:
        """Draw the projections again, and forget learned weights."""
        initialise = {
            "orthogonal": nn.init.orthogonal_,
            "xavier": nn.init.xavier_uniform_,
            "identity": nn.init.eye_,
            "zeros": nn.init.zeros_,
        }[self.init]
        for module in self.projections:
            if isinstance(module, nn.Linear):
                initialise(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.log_weights is not None:
            nn.init.zeros_(self.log_weights)

    def forward(
        self,
        student_hiddens: Sequence[Tensor],
        teacher_hiddens: Sequence[Tensor],
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> FeatureAlignment:
        """Compute the loss of all pairs.

        Args:
            student_hiddens: one tensor per pair, [B, T, Ds] or [N, Ds].
            teacher_hiddens: one tensor per pair, [B, T, Dt] or [N, Dt]; receives no gradient.
            mask: [B, T] or [N], bool or row weights >= 0; None counts every token.
            normalizer: what sums over tokens are divided by; default the sum of the weights.

        Returns:
            `.loss` [], weighted and differentiable; `.cosine` [L] and `.euclidean` [L], unweighted
            and detached.

        Raises:
            ValueError: a number of tensors, or a width, other than this module was built for.
        """
        self._check_hiddens("student_hiddens", student_hiddens, self.student_dims)
        self._check_hiddens("teacher_hiddens", teacher_hiddens, self.teacher_dims)
        projections = [self._projection(index) for index in range(self.pairs)]
        cosine_weight, euclidean_weight, penalty = self._weights()
        result = feature_alignment(
            list(student_hiddens),
            list(teacher_hiddens),
            [None if module is None else module.weight for module in projections],
            [None if module is None else module.bias for module in projections],
            mask=mask,
            cosine_weight=cosine_weight,
            euclidean_weight=euclidean_weight,
            euclidean=self.euclidean,
            pair_weights=self.pair_weights,
            normalizer=normalizer,
            eps=self.eps,
            engine=self.engine,
        )
        if penalty is None:
            return result
        return dataclasses.replace(result, loss=result.loss + penalty)

    def logs(self, result: FeatureAlignment) -> dict[str, Tensor]:
        """The two terms of a result, averaged over the pairs, and the same times their weights.

        Returns:
            [] each, detached: "cosine", "euclidean", "weighted_cosine", "weighted_euclidean";
            with learned weights also "cosine_weight" and "euclidean_weight".
        """
        cosine_weight, euclidean_weight, _ = self._weights()
        logs = {}
        for name, values, weight in (
            ("cosine", result.cosine, cosine_weight),
            ("euclidean", result.euclidean, euclidean_weight),
        ):
            mean = mean_over_pairs(values, self.pair_weights)
            logs |= {name: mean, f"weighted_{name}": (weight * mean).detach()}
            if isinstance(weight, Tensor):
                logs[f"{name}_weight"] = weight.detach()
        return logs

    def extra_repr(self) -> str:
        widths = [f"{s}->{t}" for s, t in zip(self.student_dims, self.teacher_dims, strict=True)]
        shown = widths[0] if len(set(widths)) == 1 else ", ".join(widths)
        parts = [f"{self.pairs} x {shown}" if len(set(widths)) == 1 else shown]
        parts += [f"projection={self.projection}", f"init={self.init}"]
        parts += [f"cosine_weight={self.cosine_weight:g}"]
        parts += [f"euclidean_weight={self.euclidean_weight:g} ({self.euclidean})"]
        if self.pair_weights is not None:
            parts.append(f"pair_weights={self.pair_weights}")
        if self.log_weights is not None:
            parts.append("learn_weights=True")
        return ", ".join(parts)

    def _make_projections(self, bias: bool) -> list[nn.Module]:
        dims = list(zip(self.student_dims, self.teacher_dims, strict=True))
        if self.projection == "shared":
            if len(set(dims)) != 1:
                raise ValueError(
                    f"projection='shared' must serve pairs of equal widths: got {dims}; "
                    "use 'per_pair'."
                )
            return [nn.Linear(*dims[0], bias=bias)]
        if self.projection == "none":
            for index, (student, teacher) in enumerate(dims):
                if student != teacher:
                    raise ValueError(
                        f"projection='none' must have equal widths: got {student} (student) and "
                        f"{teacher} (teacher) in pair {index}; use 'auto'."
                    )
        # An Identity keeps the place of a pair without a projection, so that the names in a
        # state_dict are the indices of the pairs.
        wants_all = self.projection == "per_pair"
        return [
            nn.Linear(student, teacher, bias=bias)
            if wants_all or student != teacher
            else nn.Identity()
            for student, teacher in dims
        ]

    def _projection(self, index: int) -> nn.Linear | None:
        module = self.projections[0 if self.projection == "shared" else index]
        return module if isinstance(module, nn.Linear) else None

    def _weights(self) -> tuple[float | Tensor, float | Tensor, Tensor | None]:
        """The two weights, and what keeps learned ones from sinking."""
        weights = (self.cosine_weight, self.euclidean_weight)
        if self.log_weights is None:
            return (*weights, None)
        learned = torch.exp(-self.log_weights.float())
        used = [s for s, weight in zip(self.log_weights, weights, strict=True) if weight > 0]
        return weights[0] * learned[0], weights[1] * learned[1], torch.stack(used).sum()

    def _check_hiddens(self, name: str, hiddens: Sequence[Tensor], dims: Sequence[int]) -> None:
        if isinstance(hiddens, Tensor):
            raise TypeError(
                f"{name} must be a list of tensors, one per pair: got one tensor; wrap it."
            )
        check_lengths(name, len(hiddens), self.pairs)
        for index, (hidden, width) in enumerate(zip(hiddens, dims, strict=True)):
            if hidden.shape[-1] != width:
                raise ValueError(
                    f"{name}[{index}] must be {width} wide, as this loss was built: got "
                    f"{list(hidden.shape)}; build FeatureAlignmentLoss with the models' widths."
                )


def _widths(student, teacher, pairs: int | None) -> tuple[list[int], list[int]]:
    """One width per pair on both sides."""
    lengths = {len(dims) for dims in (student, teacher) if not isinstance(dims, int)}
    if pairs is not None:
        lengths.add(pairs)
    if len(lengths) > 1:
        raise ValueError(
            f"student_dims, teacher_dims and pairs must agree on the number of pairs: got "
            f"{sorted(lengths)}; make the lists equally long."
        )
    count = lengths.pop() if lengths else 1
    if count < 1:
        raise ValueError(
            "there must be at least one layer pair: got none; pass one width per pair."
        )
    sides = []
    for name, dims in (("student_dims", student), ("teacher_dims", teacher)):
        widths = [dims] * count if isinstance(dims, int) else list(dims)
        for width in widths:
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise ValueError(
                    f"{name} must be positive integers: got {width!r}; pass config.hidden_size."
                )
        sides.append(widths)
    return sides[0], sides[1]
