"""Maps compared head by head: one forward launch, one for dQ and one for dK, for all pairs.

    forward    values, and the sums of every row of both sides
    gradients  tiles of scores again; dK of every query head
    groups     dK of the key heads that several query heads share

Pairs of equal dtypes, padded widths and kinds of masks make one launch. What is kept: 20 bytes per
row and head (24 for other distances than "kl"), and dK of every query head where they share keys.
"""

import torch

from .... import _triton
from . import variants
from .launches import Call, Member, Strip, add_gradients, by_form, count_programs
from .lines import pair_values


def fill(call: Call) -> None:
    problem = call.problem
    all_heads = [head for pair in problem.pairs for head in pair.teacher_heads]
    heads = _triton.make_table([[head] for head in all_heads], call.device)
    first_head = 0
    for member in call.members:
        member.kept["teacher_heads"] = first_head
        first_head += len(member.pair.teacher_heads)
        if member.wants_any:
            for name in ("student_sums", "teacher_sums"):
                member.kept[name] = call.empty(2, *member.sizes)
            for name in ("balance",) if problem.distance == "kl" else ("balance", "center"):
                member.kept[name] = call.empty(*member.sizes)
    for form, group in by_form(call.members):
        variant = variants.forward_variant(form, problem.distance, call.capability, len(group))
        jobs = []
        for member in group:
            values = pair_values(problem, member.index, "q") | member.kept
            member.slots = call.empty(count_programs(variant, values), dtype=torch.float64)
            jobs.append(values | {"slots": member.slots})
        call.launch(variant, jobs, heads)
    strips = [_strip(call, member) for member in call.members if member.wants_any]
    add_gradients(call, strips, heads, is_mean=False)


def _strip(call: Call, member: Member) -> Strip:
    """All rows of a pair."""
    batch, heads, tokens = member.sizes
    parts, grad_k = None, member.pair.grad_k
    if grad_k is not None and grad_k.shape[1] != heads:
        parts = call.empty(batch, heads, tokens, grad_k.shape[3], dtype=grad_k.dtype)
    return Strip(member, 0, tokens, key_out=grad_k, key_parts=parts)
