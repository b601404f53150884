"""Drawings of trainings, as SVG: curves of the terms of the loss, and the map of layers."""

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from .page import plt, svg
from .train_log import LogLine

_WEIGHTED = "weighted_"
_COLUMNS = 3  # of drawings beside each other


def draw_curves(logs: Mapping[str, Sequence[Sequence[LogLine]]]) -> str:
    """Every term of the loss, unweighted; a color for each name, a line for each of its logs."""
    terms = [
        name.removeprefix(_WEIGHTED)
        for name in dict.fromkeys(
            key for group in logs.values() for log in group for key in log[-1]
        )
        if name.startswith(_WEIGHTED)
    ]
    rows = math.ceil(len(terms) / _COLUMNS)
    size = (3.6 * _COLUMNS, 2.8 * rows + 0.4)
    figure, grid = plt.subplots(rows, _COLUMNS, figsize=size, layout="constrained", squeeze=False)
    for axis, term in zip_longest(grid.flat, terms):
        if term is None:
            axis.axis("off")
            continue
        for index, group in enumerate(logs.values()):
            for log in group:
                drawn = [(line["step"], line[term]) for line in log if term in line]
                if drawn:
                    axis.plot(*zip(*drawn, strict=True), color=f"C{index}")
        axis.set(title=term, xlabel="step", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    lines = [plt.Line2D([], [], color=f"C{index}", label=name) for index, name in enumerate(logs)]
    figure.legend(handles=lines, loc="outside lower center", ncols=_COLUMNS, frameon=False)
    return svg(figure)


def draw_layer_map(
    pairs: Sequence[tuple[int, int]], layers: Mapping[str, int], widths: Mapping[str, int]
) -> str:
    """The layers of both models, and a line for every pair.

    Args:
        pairs: (student layer, teacher layer), 0 the embeddings.
        layers: blocks of "student" and "teacher".
        widths: features of their hidden states.
    """
    tallest = max(layers.values())
    figure, axis = plt.subplots(figsize=(6, 0.5 * tallest + 1.3), layout="constrained")

    def height(side: int, layer: int) -> float:
        return layer * tallest / layers[("student", "teacher")[side]]

    for side, name in enumerate(("student", "teacher")):
        used = {pair[side] for pair in pairs}
        for layer in range(layers[name] + 1):
            is_used = layer in used
            axis.text(
                side,
                height(side, layer),
                f"layer {layer}" if layer else "embeddings",
                ha="center",
                va="center",
                color="black" if is_used else "#8a8f98",
                bbox={
                    "boxstyle": "round,pad=0.35",
                    "facecolor": "#ddf4ff" if is_used else "#f6f8fa",
                    "edgecolor": "#1f6feb" if is_used else "#d0d7de",
                },
            )
        axis.text(side, tallest + 0.8, f"{name}, {widths[name]} wide", ha="center", weight="bold")
    for pair in pairs:
        ends = [height(side, layer) for side, layer in enumerate(pair)]
        axis.plot([0, 1], ends, color="#1f6feb", linewidth=1.5, zorder=1)
    axis.set(xlim=(-0.3, 1.3), ylim=(-0.5, tallest + 1.3))
    axis.axis("off")
    return svg(figure)
