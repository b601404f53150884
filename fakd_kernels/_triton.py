"""What the Triton engines of several ops share: device helpers, tables, launches.

Imports Triton, so it is imported lazily, by a launcher that is about to run. One launch serves
many layer pairs: their pointers, sizes and strides travel in an int64 table on the device, one
line per job, and a program finds its job by its index. Sizes are then data, not arguments: no
recompilation when a sequence length changes, and one launch for any number of pairs.

Under the interpreter kernels read CPU tensors. Trap, seen on 3.7.1, 3.8.0 and 3.9.0: an
interpreted `tl.dot` on bfloat16 operands returns garbage, and a cast to bfloat16 truncates; both
are worked around where `IS_INTERPRETED` is tested.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_NEVER = 2**62  # first program of a line that pads a table


@triton.jit
def tanh(x):
    """To 2 units in the last place: the polynomial of Cephes' tanhf where |x| is small."""
    size = tl.abs(x)
    z = x * x
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = series * z - 5.37397155531e-2
    series = series * z + 1.33314422036e-1
    series = series * z - 3.33332819422e-1
    large = 1 - 2 / (tl.exp2(size * 2.885390081777927) + 1)
    return tl.where(size < 0.625, series * z * x + x, tl.where(x < 0, -large, large))


@triton.jit
def log2(x, IS_INTERPRETED: tl.constexpr):
    """To a unit in the last place. `tl.log2` on a card is off by 2^-22 of its result, and so would
    be, some ten times that, the probabilities that are made of it."""
    if IS_INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.log2(x)


@triton.jit
def find_line(table_ptr, program, FIELDS: tl.constexpr, LINES: tl.constexpr):
    """The last line whose first field, its first program, is at most `program`.

    All lines are compared at once: a scan would pay the latency of one load per line.
    """
    firsts = tl.load(table_ptr + tl.arange(0, LINES) * FIELDS)
    return tl.sum((firsts <= program).to(tl.int32), 0) - 1


@triton.jit
def load_pointer(field_ptr, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """A pointer stored as an integer; `IS_ALIGNED` promises the compiler 16 bytes."""
    pointer = tl.load(field_ptr).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_size(field_ptr, IS_ALIGNED: tl.constexpr):
    """A stored width or stride, int64; `IS_ALIGNED` promises the compiler a multiple of 16."""
    size = tl.load(field_ptr)
    if IS_ALIGNED:
        size = tl.multiple_of(size, 16)
    return size


@triton.jit
def cast(x, DTYPE: tl.constexpr, IS_INTERPRETED: tl.constexpr):
    """`x.to(DTYPE)` rounded to nearest even, which the interpreter's cast to bfloat16 is not."""
    if IS_INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = rounded.to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), rounded, x)  # a NaN's bits must not carry
    return x.to(DTYPE)


@triton.jit
def widen(x, IS_INTERPRETED: tl.constexpr):
    """`x.to(tl.float32)`, which the interpreter gets wrong for subnormal numbers of bfloat16."""
    if IS_INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, IS_INTERPRETED: tl.constexpr):
    """acc + a @ b in float32; PRECISION "native" multiplies half operands as they are."""
    if IS_INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif PRECISION == "native":
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


def is_aligned(tensor: Tensor) -> bool:
    """Whether rows of a 2-D tensor can be read 16 bytes at a time, in blocks of 16 elements."""
    return tensor.data_ptr() % 16 == 0 and tensor.shape[-1] % 16 == 0 and tensor.stride(0) % 16 == 0


@functools.cache
def capability(device: torch.device) -> int:
    """80, 90, 100, 120: the compute capability as Triton's targets write it; 80 without a card."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def is_tf32_allowed() -> bool:
    """Whether torch lets float32 products on CUDA round their operands to tf32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def next_power_of_2(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def make_table(lines: Sequence[Sequence[int | Tensor | None]], device: torch.device) -> Tensor:
    """[next power of two, fields] int64 on the device; a tensor becomes its address, None 0.

    The first field of every line is its first program, in ascending order; lines that pad the
    table begin where no program is. The copy does not wait for the device. A table is only read,
    so one of equal numbers serves again: of a training loop, whose tensors return to the addresses
    they had in the step before, most do, and making one takes a host longer than a launch.
    """
    numbers = tuple(_number(value) for line in lines for value in line)
    fields = len(numbers) // len(lines)
    padding = next_power_of_2(len(lines)) - len(lines)
    numbers += ((_NEVER,) + (0,) * (fields - 1)) * padding
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64).view(-1, fields)
    if torch.cuda.is_current_stream_capturing():
        table = torch.tensor(numbers, dtype=torch.int64, pin_memory=True)
        _captured.append(table)  # a CUDA graph copies its tables again at every replay
        table = table.to(device, non_blocking=True)
    else:
        table = _table(numbers, device, torch.cuda.current_stream(device).cuda_stream)
    return table.view(-1, fields)


@functools.lru_cache(maxsize=1024)
def _table(numbers: tuple[int, ...], device: torch.device, _stream: int) -> Tensor:
    """By stream, since it is on the stream of its copy that a table is sure to be there."""
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=True)
    return host.to(device, non_blocking=True)


_captured: list[Tensor] = []


def _number(value: int | Tensor | None) -> int:
    if value is None:
        return 0
    return value.data_ptr() if isinstance(value, Tensor) else int(value)


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that is compiled into it: what a launch and a dry compile share."""

    kernel: triton.JITFunction
    signature: dict[str, str]  # run-time arguments, in order, with Triton's type names
    constants: dict[str, object]
    num_warps: int
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int | bool]:
        """Of the compiler.

        Products and sums round apart, as they do in the interpreter and in eager PyTorch: fused,
        a score times a factor would differ in its last bits from the maximum it was rounded to,
        and a row of one key would have a gradient.
        """
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": False,
        }

    def launch(self, count: int, device: torch.device, *arguments) -> None:
        """Run `count` programs."""
        if count == 0:
            return
        for record in _records:
            record.append((self.kernel.__name__, count))
        self.kernel[(count,)](*arguments, **self.constants, **self.options)


_records: list[list[tuple[str, int]]] = []


@contextlib.contextmanager
def record_launches() -> Iterator[list[tuple[str, int]]]:
    """Collect (kernel name, number of programs) of every launch inside the block."""
    record: list[tuple[str, int]] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)
