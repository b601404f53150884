"""Tile sizes of every kernel, by generation of card."""

from dataclasses import dataclass, replace

from ...._engines import interpreted
from ...._triton import next_power_of_2
from ...._tuning import pick


@dataclass(frozen=True)
class Tile:
    own: int
    other: int
    num_warps: int = 8
    num_stages: int = 3


# By generation, kernel, and width of the wider side (up to 64, 128, 256), for half operands: own
# rows are kept whole in shared memory, as are the other rows of every stage. Where nothing else is
# said, 128 own rows in 8 warps, which leave a thread 32 scores of each side and, for a gradient,
# half its width: the largest found whose registers do not spill and whose stages fit shared memory,
# as tests/kernels/test_triton_aot_attention.py asserts. Tuning looks for faster ones.
_WIDE, _NARROW, _SMALL = Tile(128, 64), Tile(128, 32), Tile(64, 64, 4)
_HALF = {
    80: {  # mma.sync, 163 KiB of shared memory
        "forward": (_WIDE, _WIDE, Tile(128, 32, 8, 2)),
        "gradient": (_WIDE, _NARROW, Tile(32, 32, 4, 2)),
        "map": (_NARROW, Tile(64, 32), Tile(64, 32)),
    },
    90: {  # wgmma, 227 KiB; up to 128 wide by time: of 14 on an H100 the best that spill little
        "forward": (_SMALL, _SMALL, _NARROW),
        "gradient": (Tile(64, 64, 4, 2), Tile(128, 32, 4), Tile(64, 32, 8, 2)),
        "map": (_NARROW, _SMALL, Tile(128, 32, 8, 2)),
        "heavy forward": (_NARROW, _NARROW, _NARROW),
        "heavy gradient": (_NARROW, _NARROW, Tile(64, 32, 8, 2)),
        "heavy map": (_NARROW, _NARROW, Tile(128, 32, 8, 2)),
    },
    100: {  # tcgen05, 227 KiB
        "forward": (_WIDE, _WIDE, _NARROW),
        "gradient": (_NARROW, _NARROW, Tile(64, 32, 8, 2)),
        "map": (_NARROW, _NARROW, Tile(64, 32, 8, 2)),
    },
    120: {  # mma.sync, 99 KiB: also sm_86 and sm_89
        "forward": (_WIDE, Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        "gradient": (_NARROW, _NARROW, Tile(32, 32, 4, 2)),
        "map": (_NARROW, Tile(64, 32), Tile(32, 32, 4, 2)),
    },
}
_FLOAT = Tile(64, 32, 8, 2)  # where a side goes in steps, alike for every width
_INTERPRETED_TILE = Tile(32, 32, 4, 1)  # so that small tests meet several tiles


def choose_tile(
    kind: str,
    capability: int,
    width: int,
    is_float: bool,
    is_heavy: bool = False,
    is_aligned: bool = True,
) -> Tile:
    """The first of the candidates, or the one that was fastest on this card.

    `is_heavy`: more arithmetic per score than "kl" without softcaps has, hence registers.
    """
    if not (is_float or is_aligned or interpreted()):  # a pointer for every element that is loaded
        return Tile(32, 32, 4, 2)
    size = (width > 64) + (width > 128)
    if interpreted():
        tile = _INTERPRETED_TILE
    elif is_float:
        tile = _FLOAT
    else:
        is_small = capability in (86, 89) or capability >= 120
        generation = 120 if is_small else capability // 10 * 10
        tiles, heavy = _HALF[generation], f"heavy {kind}"
        tile = tiles[heavy if is_heavy and heavy in tiles else kind][size]
        if is_heavy and heavy not in tiles:
            tile = replace(tile, other=max(32, tile.other // 2))
    words = f"{'float' if is_float else 'half'}{' heavy' if is_heavy else ''}"
    return pick(f"attention_kl {kind} {words} {64 << size} sm_{capability}", _candidates(tile))


def _candidates(tile: Tile) -> tuple[Tile, ...]:
    """Others ask for no more shared memory, so they fit where the first does."""
    others = [replace(tile, own=max(32, tile.own // 2)), replace(tile, other=tile.other // 2)]
    if tile.num_stages > 2:
        others.append(replace(tile, num_stages=tile.num_stages - 1))
    return tile, *[other for other in others if other != tile and other.other >= 16]


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
