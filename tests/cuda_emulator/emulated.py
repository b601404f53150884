"""Builds kernels of csrc/cuda for a CPU, with sanitizers, and runs them as an engine would."""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from build_backend import find_nvcc, nvcc_folders

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "cuda"
_FLAGS = (
    *("-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
)
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/cuda: enum class Dtype


def build(source: str, folder: Path, kernels: Path = KERNELS, *flags: str) -> Path:
    """Compile a program of this folder against the kernels; CUDA's own half types where found."""
    program = folder / Path(source).stem
    includes = [f"-I{HERE}", f"-I{kernels}"]
    if (nvcc := find_nvcc()) is not None:
        includes += [f"-isystem{folder}" for folder in nvcc_folders(nvcc)["INCLUDES"]]
    command = [
        shutil.which("g++"),
        *_FLAGS,
        *flags,
        *includes,
        str(HERE / source),
        "-o",
        str(program),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[:4000]
    return program


def run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    # Everything is freed when the process ends; the leak checker would need ptrace.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    command = [program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


class EmulatedFeatureAlignment:
    """Fills a `Problem` as csrc/cuda/bindings.cpp does on a card."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program = program
        self._input, self._output = folder / "problem", folder / "results"

    def fill(self, problem) -> None:
        self._input.write_bytes(_pack(problem))
        result = run(self.program, self._input, self._output)
        assert result.returncode == 0, result.stderr[:4000]
        data = bytearray(self._output.read_bytes())
        outputs = [
            problem.sums,
            *[p.grad_student for p in problem.pairs if p.grad_student is not None],
        ]
        begin = 0
        for tensor in outputs:
            if tensor.numel() > 0:
                values = torch.frombuffer(
                    data, dtype=tensor.dtype, count=tensor.numel(), offset=begin
                )
                tensor.copy_(values.view_as(tensor))
            begin += tensor.nbytes
        assert begin == len(data)


def _pack(problem) -> bytes:
    """The file that feature_alignment.cpp reads."""
    parts = [struct.pack("<qqf", len(problem.pairs), problem.is_squared, problem.eps)]
    for pair in problem.pairs:
        parts += [struct.pack("<qq", *pair.student.shape), _matrix(pair.student)]
        parts += [_matrix(pair.teacher), struct.pack("<q", pair.row_weights is not None)]
        if pair.row_weights is not None:
            parts.append(_bytes(pair.row_weights))
        grad = pair.grad_student
        place = (0, 0) if grad is None else (grad.itemsize, grad.data_ptr() % 16)
        parts.append(struct.pack("<qq", *place))
    return b"".join([*parts, _bytes(problem.coefficients)])


def _matrix(rows: Tensor) -> bytes:
    """With all that lies between its rows, and its place relative to 16 bytes."""
    count, width = rows.shape
    header = struct.pack("<qqq", _DTYPES[rows.dtype], rows.stride(0), rows.data_ptr() % 16)
    length = (count - 1) * rows.stride(0) + width if count > 0 else 0
    return header + _bytes(rows.detach().as_strided((length,), (1,)))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
