"""What the losses share: checks of their settings, and weights of layer pairs."""

from collections.abc import Sequence

from torch import Tensor


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}: got {value!r}; choose one."
        )


def check_weight(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number >= 0: got {value}; pass one.")


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be finite and > 0: got {temperature}; pass 1.")


def check_lengths(name: str, received: int, expected: int) -> None:
    if received != expected:
        raise ValueError(
            f"{name} must have one entry per layer pair: got {received} for {expected} pairs; "
            "make it as long as the map."
        )


def checked_pair_weights(weights: Sequence[float] | None, pairs: int) -> list[float] | None:
    if weights is None:
        return None
    check_lengths("pair_weights", len(weights), pairs)
    for index, weight in enumerate(weights):
        check_weight(f"pair_weights[{index}]", weight)
    return [float(weight) for weight in weights]


def mean_over_pairs(values: Tensor, pair_weights: list[float] | None) -> Tensor:
    """The sum of values [L] with their weights, 1 / L each by default."""
    return (
        values.mean() if pair_weights is None else (values.new_tensor(pair_weights) * values).sum()
    )
