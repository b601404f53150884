"""The emulated kernels of projected rows behind the names of torch.ops that the launcher calls."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .emulated import _bytes, _matrix, run
from .emulated_outputs import schemas


class EmulatedProjected:
    """Does what csrc/cuda/bindings_projected.cpp does on a card.

    `entries` has, for every call of align_projected, the shape of P in each of its entries.
    """

    def __init__(self, program: Path, folder: Path) -> None:
        self.program = program
        self.entries: list[list[tuple[int, int]]] = []
        self._input, self._output = folder / "problem", folder / "results"

    @contextmanager
    def registered(self) -> Iterator["EmulatedProjected"]:
        """torch.ops.fakd_ext has these operators for CPU tensors until the end."""
        library = torch.library.Library("fakd_ext", "FRAGMENT")
        for name, schema in schemas("bindings_projected.cpp").items():
            library.define(schema)
            library.impl(name, getattr(self, name), "CPU")
        try:
            yield self
        finally:
            library._destroy()

    def align_projected(
        self,
        projected,
        teacher,
        row_weights,
        has_row_weights,
        coefficients,
        pair,
        grad,
        wants_grad,
        values,
        is_squared,
        eps,
    ) -> None:
        self.entries.append([tuple(p.shape) for p in projected])
        parts = [struct.pack("<qqqf", 0, len(projected), is_squared, eps)]
        parts += [struct.pack("<q", len(coefficients)), _bytes(coefficients)]
        weights, grads = iter(row_weights), iter(grad)
        outputs = []
        for entry, p in enumerate(projected):
            parts.append(struct.pack("<qqq", pair[entry], *p.shape))
            parts += [_matrix(p), _matrix(teacher[entry])]
            parts.append(struct.pack("<q", has_row_weights[entry]))
            if has_row_weights[entry]:
                parts.append(_bytes(next(weights)))
            place = (0, 0)
            if wants_grad[entry]:
                outputs.append(own := next(grads))
                assert (own.dtype == torch.bfloat16) != (own.data_ptr() == p.data_ptr())
                place = own.itemsize, own.data_ptr() % 16
            parts.append(struct.pack("<qq", *place))
            outputs.append(values[entry])
        assert next(weights, None) is None
        assert next(grads, None) is None
        self._run(parts, outputs)

    def sum_values(self, values, sums) -> None:
        parts = [struct.pack("<qq", 1, len(values))]
        for rows in values:
            parts += [struct.pack("<q", len(rows)), _bytes(rows)]
        self._run(parts, sums)

    def _run(self, parts: list[bytes], outputs: list[Tensor]) -> None:
        self._input.write_bytes(b"".join(parts))
        result = run(self.program, self._input, self._output)
        assert result.returncode == 0, result.stderr[:4000]
        data = bytearray(self._output.read_bytes())
        begin = 0
        for output in outputs:
            assert output.is_contiguous()
            if output.numel() > 0:
                written = torch.frombuffer(
                    data, dtype=output.dtype, count=output.numel(), offset=begin
                )
                output.copy_(written.view_as(output))
            begin += output.nbytes
        assert begin == len(data)
