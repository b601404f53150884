"""Tile sizes of every kernel, by generation of card."""

from dataclasses import dataclass

from ...._engines import interpreted
from ...._triton import next_power_of_2


@dataclass(frozen=True)
class Tile:
    own: int
    other: int
    num_warps: int = 8
    num_stages: int = 3


_INTERPRETED_TILE = Tile(32, 32, 4, 1)  # so that small tests meet several tiles


def choose_tile(kind: str, capability: int, width: int, is_float: bool) -> Tile:
    """Tiles that fit the registers and shared memory of every card; not tuned, for want of one."""
    if interpreted():
        return _INTERPRETED_TILE
    if is_float:
        return Tile(64, 32, 8, 2)
    return Tile(64, 32, 8, 2) if width <= 128 else Tile(32, 32, 4, 2)


STEP = 16  # columns of float32: 64 bytes of a row
_FLOAT_PIECE = 64


def split_width(width: int, precision: str) -> tuple[tuple[tuple[int, int], ...], int]:
    """The first column and width of the pieces of a head, and the step (see `SideForm`).

    Pieces are powers of two, of which the last is padded: 96 = 64 + 32 costs three quarters of 128.
    Where rows go in steps there is one piece, which a program makes of the gradient.
    """
    whole = max(16, next_power_of_2(width))
    if precision != "native":
        return ((0, min(whole, _FLOAT_PIECE)),), min(whole, 32 if interpreted() else STEP)
    half = whole // 2
    if half >= 16 and half + (rest := max(16, next_power_of_2(width - half))) < whole:
        return ((0, half), (half, rest)), 0
    return ((0, whole),), 0


def count_blocks(size: int, block: int) -> int:
    return -(-size // block)
