"""The emulated dual-softmax kernels behind the names of torch.ops that the launchers call."""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .emulated import _DTYPES, KERNELS, _bytes, run

_LOGITS, _SCORES, _PROBABILITIES, _SUMS = range(4)  # dual_softmax.cpp: enum class Task


def schemas(bindings: str = "bindings_output.cpp") -> dict[str, str]:
    """Those of a file of csrc/cuda by name: a call that does not fit one is refused."""
    text = (KERNELS / bindings).read_text()
    found = re.findall(r"m\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", text)
    joined = ["".join(re.findall(r'"([^"]*)"', literals)) for literals in found]
    return {schema.split("(")[0]: schema for schema in joined}


class EmulatedOutputs:
    """Does what csrc/cuda/bindings_output.cpp does on a card; `calls` counts it."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program = program
        self.calls: list[str] = []
        self._input, self._output = folder / "problem", folder / "results"

    @contextmanager
    def registered(self) -> Iterator["EmulatedOutputs"]:
        """torch.ops.fakd_ext has these operators for CPU tensors until the end."""
        library = torch.library.Library("fakd_ext", "FRAGMENT")
        for name, schema in schemas().items():
            library.define(schema)
            library.impl(name, getattr(self, name), "CPU")
        try:
            yield self
        finally:
            library._destroy()

    def score_logits(
        self,
        student,
        teacher,
        student_bias,
        teacher_bias,
        labels,
        row_weights,
        coefficients,
        grad,
        per_token,
        student_softcap,
        teacher_softcap,
        temperature,
        jsd_beta,
        distance,
    ) -> None:
        numbers = (1 / temperature, student_softcap, teacher_softcap, jsd_beta)
        parts = [struct.pack("<qq3fd", _LOGITS, distance, *numbers)]
        parts += [struct.pack("<qq", *student.shape), _optional(student_bias)]
        parts += [_optional(teacher_bias), _optional(labels), struct.pack("<q", 1)]
        student, teacher = student[None, None], teacher[None, None]
        grad = None if grad is None else grad[None, None]
        parts += _pair(student, teacher, grad, row_weights, [0], coefficients, False, -1)
        outputs = [per_token] if grad is None else [grad, per_token]
        self._run("score_logits", parts, outputs)

    def sum_logits(self, per_token, row_weights, sums) -> None:
        parts = [struct.pack("<qq", _SUMS, len(per_token)), _bytes(per_token)]
        self._run("sum_logits", [*parts, _optional(row_weights)], [sums])

    def score_maps(
        self,
        student,
        teacher,
        row_weights,
        has_row_weights,
        coefficients,
        grads,
        wants_grad,
        sums,
        teacher_heads,
        is_causal,
        window,
        are_scores,
        temperature,
        distance,
    ) -> None:
        task = _SCORES if are_scores else _PROBABILITIES
        parts = [struct.pack("<qq3fd", task, distance, 1 / temperature, 0, 0, 0.5)]
        parts += [struct.pack("<5qq", 0, 0, 0, 0, 0, len(student))]
        weights, wanted, heads = iter(row_weights), iter(grads), iter(teacher_heads)
        outputs = []
        for index, maps in enumerate(student):
            grad = next(wanted) if wants_grad[index] else None
            parts += _pair(
                maps,
                teacher[index],
                grad,
                next(weights) if has_row_weights[index] else None,
                [next(heads) for _ in range(maps.shape[1])],
                coefficients[index : index + 1],
                is_causal[index],
                window[index],
            )
            outputs += [sums[index]] if grad is None else [grad, sums[index]]
        assert next(heads, None) is None
        self._run("score_maps", parts, outputs)

    def _run(self, name: str, parts: list[bytes], outputs: list[Tensor]) -> None:
        self.calls.append(name)
        self._input.write_bytes(b"".join(parts))
        result = run(self.program, self._input, self._output)
        assert result.returncode == 0, result.stderr[:4000]
        data = bytearray(self._output.read_bytes())
        for output in outputs:
            span = _span(output)
            if span.numel() == 0:
                continue
            written = torch.frombuffer(data, dtype=output.dtype, count=span.numel())
            data = data[span.nbytes :]
            _check_gaps(output, span, written)
            span.copy_(written)
        assert len(data) == 0


def _check_gaps(output: Tensor, before: Tensor, after: Tensor) -> None:
    """What lies between the rows of an output must be as it was."""
    is_gap = torch.ones(before.shape, dtype=torch.bool)
    is_gap.as_strided(output.shape, output.stride()).fill_(False)
    assert torch.equal(before[is_gap].view(torch.uint8), after[is_gap].view(torch.uint8))


def _span(tensor: Tensor) -> Tensor:
    """The memory of a tensor, and all that lies between its rows."""
    length = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.detach().as_strided((length if tensor.numel() > 0 else 0,), (1,))


def _pair(
    student: Tensor,
    teacher: Tensor,
    grad: Tensor | None,
    row_weights: Tensor | None,
    teacher_heads: list[int],
    coefficients: Tensor,
    is_causal: bool,
    window: int,
) -> list[bytes]:
    """[B, H, T, T] of a layer pair, or [1, 1, N, V] of logits."""
    batch, heads, rows, width = student.shape
    gradient = 0
    if grad is not None:
        gradient = 2 if grad.data_ptr() == student.data_ptr() and grad.numel() > 0 else 1
    parts = [struct.pack("<6qq", batch, heads, rows, width, is_causal, window, gradient)]
    parts += [_rows(student), _rows(teacher)]
    if gradient == 1:
        parts.append(_rows(grad))
    parts += [_optional(row_weights), struct.pack(f"<{heads}q", *teacher_heads)]
    return [*parts, _bytes(coefficients)]


def _rows(tensor: Tensor) -> bytes:
    span = _span(tensor)
    offset = tensor.data_ptr() % 16
    return struct.pack(
        "<6q", _DTYPES[tensor.dtype], *tensor.stride()[:3], offset, span.nbytes
    ) + _bytes(span)


def _optional(tensor: Tensor | None) -> bytes:
    return struct.pack("<q", tensor is not None) + (b"" if tensor is None else _bytes(tensor))
