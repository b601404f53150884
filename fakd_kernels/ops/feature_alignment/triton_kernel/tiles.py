"""Tile sizes of every kernel, by generation of card."""

from dataclasses import dataclass, replace

from ...._engines import interpreted
from ...._triton import next_power_of_2
from ...._tuning import pick


@dataclass(frozen=True)
class Tile:
    """Block sizes of a product: rows, columns, and bytes of depth of one operand row."""

    m: int
    n: int
    depth_bytes: int
    num_stages: int
    num_warps: int = 8


# By generation: of plain products and of those that sum rows in their epilogue, native and float.
# The largest whose registers do not spill and whose stages fit shared memory, as
# tests/kernels/test_triton_aot.py asserts. Chosen 2026-11; not yet tuned on a card.
_TILES = {
    80: {  # mma.sync, 163 KiB of shared memory
        ("native", "plain"): Tile(128, 128, 128, 4),
        ("native", "sums"): Tile(128, 128, 64, 4),
        ("float", "plain"): Tile(128, 64, 64, 4),
        ("float", "sums"): Tile(128, 64, 64, 4),
    },
    90: {  # wgmma, 227 KiB
        ("native", "plain"): Tile(128, 128, 128, 4),
        ("native", "sums"): Tile(128, 128, 128, 4),
        ("float", "plain"): Tile(128, 64, 128, 4),
        ("float", "sums"): Tile(128, 64, 128, 4),
    },
    100: {  # tcgen05, 227 KiB
        ("native", "plain"): Tile(128, 128, 128, 4),
        ("native", "sums"): Tile(128, 64, 128, 4),
        ("float", "plain"): Tile(128, 64, 128, 4),
        ("float", "sums"): Tile(128, 64, 128, 4),
    },
    120: {  # mma.sync, 99 KiB: also sm_86 and sm_89
        ("native", "plain"): Tile(128, 128, 128, 3),
        ("native", "sums"): Tile(128, 64, 64, 4),
        ("float", "plain"): Tile(128, 64, 64, 5),
        ("float", "sums"): Tile(128, 32, 64, 4),
    },
}
_INTERPRETED_TILE = Tile(64, 64, 256, 1, 4)  # so that small tests meet several tiles


def choose_tile(capability: int, precision: str, has_sums: bool = False) -> Tile:
    """The first of the candidates, or the one that was fastest on this card."""
    is_small = capability in (86, 89) or capability >= 120
    generation = 120 if is_small else capability // 10 * 10
    kind = "native" if precision == "native" else "float", "sums" if has_sums else "plain"
    tile = _INTERPRETED_TILE if interpreted() else _TILES[generation][kind]
    return pick(f"feature_alignment {precision} {kind[1]} sm_{capability}", _candidates(tile))


def _candidates(tile: Tile) -> tuple[Tile, ...]:
    """Others ask for no more shared memory, so they fit where the first does."""
    others = [replace(tile, n=max(32, tile.n // 2))]
    if tile.num_stages > 2:
        others.append(replace(tile, num_stages=tile.num_stages - 1))
    return tile, *[other for other in others if other != tile]


def align_block(width: int) -> tuple[int, int]:
    """Rows and columns of a tile: 2048 elements, or a whole row of up to 4096."""
    widest = 2048 if interpreted() else 4096  # narrow enough that tests meet a wider row
    columns = max(16, next_power_of_2(width))
    if columns > widest:
        columns = widest // 2
    return max(1, min(4, 2048 // columns)), columns  # more rows, more float64 scalars a thread


LONG_TILE = (16, 256)  # rows and columns of a tile of the gram rows, which loops over columns
COLUMN_BLOCK = 32  # columns of a program of the column sums


def count_blocks(size: int, block: int) -> int:
    return -(-size // block)


def gram_blocks(rows: int) -> int:
    """Programs, and slots, of `gram_rows_kernel` for so many rows."""
    return count_blocks(rows, LONG_TILE[0])
