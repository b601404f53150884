"""Maps averaged over heads first, see `mean_kernels`: a strip of query rows after the other.

    sums       of every row of every head of both sides
    map        the derivative by the mean map, of the strip; values
    centers    of every row of every head
    gradients  as in `match`, from the derivative instead of the teacher
    groups     dK is added to that of the strips before

A chunk holds as many strips, of any pairs, as fit `CHUNK_BYTES` of derivatives, so memory stays
linear in T; a call whose pairs fit one chunk makes one launch of each kind.
"""

from collections.abc import Iterator

import torch

from .... import _triton
from . import variants
from .launches import Call, Member, Strip, add_gradients, by_form, grouped
from .lines import pair_values, side_values
from .tiles import count_blocks

CHUNK_BYTES = 32 << 20  # they stay in the L2 of an A100 (40 MiB) or H100 (50 MiB)
_STRIP_STEP = 128  # rows of a strip are a multiple of this, whole tiles


def fill(call: Call) -> None:
    _fill_sums(call)
    strips = [strip for member in call.members for strip in _strips(call, member)]
    chunks = list(_chunks(strips))
    sizes = [[strip.map_size for strip in chunk] for chunk in chunks]
    maps = call.empty(max(map(sum, sizes)))
    no_heads = _triton.make_table([[0]], call.device)
    for chunk, own_sizes in zip(chunks, sizes, strict=True):
        room = maps[: sum(own_sizes)].split(own_sizes)
        for strip, own in zip(chunk, room, strict=True):
            strip.map = own if strip.map_size else None
        _fill_maps(call, chunk)
        wanted = [strip for strip in chunk if strip.member.wants_any]
        _fill_centers(call, wanted)
        add_gradients(call, wanted, no_heads, is_mean=True)
    for member in call.members:
        grad_k, total = member.pair.grad_k, member.key_total
        if total is not None and total is not grad_k:
            grad_k.copy_(total)


def _fill_sums(call: Call) -> None:
    jobs = []
    for member in call.members:
        values = pair_values(call.problem, member.index, "q")
        for name in ("student", "teacher"):
            side = getattr(member.pair, name)
            sums = call.empty(2, *side.q.shape[:3])
            member.kept[f"{name}_sums"] = sums
            # The kernel knows one side, by the fields of the student.
            own = values | side_values("student", side, call.problem.temperature, "q")
            key = getattr(member.form, name), member.form.has_weights
            jobs.append((key, own | {"student_sums": sums}))
        if member.wants_any:
            member.kept["center"] = call.empty(*member.sizes)
    for (form, has_weights), group in grouped(jobs, lambda job: job[0]).items():
        variant = variants.sums_variant(form, has_weights, call.capability, len(group))
        call.launch(variant, [values for _, values in group])


def _strips(call: Call, member: Member) -> list[Strip]:
    """The strips of a pair, of which only the last is smaller than a chunk."""
    batch, heads, tokens = member.sizes
    rows = max(1, tokens)
    if member.wants_any:
        row_bytes = 4 * batch * tokens
        rows = max(1, CHUNK_BYTES // max(1, row_bytes * _STRIP_STEP)) * _STRIP_STEP
    ranges = [(begin, min(tokens, begin + rows)) for begin in range(0, max(1, tokens), rows)]
    grad_k, parts = member.pair.grad_k, None
    if grad_k is not None and (len(ranges) > 1 or grad_k.shape[1] != heads):
        parts = call.empty(batch, heads, tokens, grad_k.shape[3], dtype=grad_k.dtype)
        is_sum = len(ranges) > 1 and grad_k.dtype != torch.float32
        member.key_total = call.empty(*grad_k.shape) if is_sum else grad_k
    strips = [
        Strip(
            member,
            *rows,
            key_out=grad_k if parts is None else member.key_total,
            key_parts=parts,
            is_added=index > 0,
            map_size=batch * (rows[1] - rows[0]) * tokens if member.wants_any else 0,
        )
        for index, rows in enumerate(ranges)
    ]
    variant = _map_variant(call, [strips[0]])
    counts = [_count_tiles(variant, strip.values(call.problem, "q")) for strip in strips]
    member.slots = call.empty(sum(counts), dtype=torch.float64)
    for strip, slots in zip(strips, member.slots.split(counts), strict=True):
        strip.slots = slots
    return strips


def _chunks(strips: list[Strip]) -> Iterator[list[Strip]]:
    """Strips in their order; two of one pair never share a chunk, since both add to its dK."""
    chunk, room = [], CHUNK_BYTES
    for strip in strips:
        cost = 4 * strip.map_size
        if chunk and (cost > room or strip.is_added):
            yield chunk
            chunk, room = [], CHUNK_BYTES
        chunk.append(strip)
        room -= cost
    yield chunk


def _map_variant(call: Call, group: list[Strip]) -> _triton.Variant:
    form = group[0].member.form
    return variants.map_variant(form, call.problem.distance, call.capability, len(group))


def _count_tiles(variant: _triton.Variant, values: dict) -> int:
    rows = count_blocks(values["end"] - values["begin"], variant.constants["BLOCK_OWN"])
    columns = count_blocks(values["upper"], variant.constants["BLOCK_OTHER"])
    return values["batches"] * rows * columns


def _fill_maps(call: Call, chunk: list[Strip]) -> None:
    for _, group in by_form(chunk):
        jobs = [strip.values(call.problem, "q") for strip in group]
        call.launch(_map_variant(call, group), jobs, count=_count_tiles)


def _fill_centers(call: Call, chunk: list[Strip]) -> None:
    distance = call.problem.distance
    for form, group in by_form(chunk):
        variant = variants.center_variant(form, distance, call.capability, len(group))
        call.launch(variant, [strip.values(call.problem, "q") for strip in group])
