"""The accuracy rule: no engine may be worse than twice eager PyTorch, plus a named floor."""

import torch
from torch import Tensor

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
FLOOR_UNITS = 4


def assert_accurate(
    name: str, got: Tensor, truth: Tensor, eager: Tensor, dtype: torch.dtype
) -> None:
    """Hold `got` to the rule of the design.

    Worst error and RMS error against `truth` (float64), both scaled by the RMS of the truth, must
    each be at most twice the same error of `eager` plus four units of roundoff of `dtype`. Shapes
    must agree, and so must the pattern of non-finite values once the truth is rounded to `dtype`.

    Args:
        name: what is compared, for the message.
        got: the result under test.
        truth: the plain formula in float64 on the same rounded inputs.
        eager: the plain formula in `dtype`.
        dtype: sets the floor, and must be the dtype of `got` unless `got` is a float32 scalar.
    """
    if got.shape != truth.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(truth.shape)}")
    got64, eager64 = got.detach().double(), eager.detach().to(got.device).double()
    truth = truth.detach().to(got.device).double()
    finite = torch.isfinite(truth.to(dtype))
    if not torch.equal(torch.isfinite(got64), finite):
        first = (torch.isfinite(got64) != finite).nonzero()[0].tolist()
        raise AssertionError(
            f"{name}: finite where it should not be, or the reverse, first at {first}: "
            f"got {got64[tuple(first)]}, truth {truth[tuple(first)]}"
        )
    if not finite.any():
        return
    scale = truth[finite].square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    # Where eager itself overflows, it is replaced by the truth correctly rounded.
    eager64 = torch.where(torch.isfinite(eager64), eager64, truth.to(dtype).double())
    error = ((got64 - truth).abs() / scale).where(finite, 0)
    eager_error = ((eager64 - truth).abs() / scale).where(finite, 0)
    floor = FLOOR_UNITS * UNIT_ROUNDOFF[dtype]
    for kind, reduce in (("worst", torch.amax), ("RMS", lambda x: x.square().mean().sqrt())):
        measured, allowed = float(reduce(error)), 2 * float(reduce(eager_error)) + floor
        if not measured <= allowed:
            place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
            raise AssertionError(
                f"{name}: {kind} error {measured:.3e} exceeds {allowed:.3e} "
                f"(eager {float(reduce(eager_error)):.3e}, floor {floor:.1e}); worst at "
                f"{list(place)}: got {got64[place]:.9g}, truth {truth[place]:.9g}, "
                f"eager {eager64[place]:.9g}"
            )
