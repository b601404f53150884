"""The CUDA kernels compiled for cards that are not here: what registers, spills and PTX tell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import build_backend

NVCC = build_backend.find_nvcc()
if NVCC is None:
    pytest.skip("needs nvcc: install the CUDA toolkit or set CUDA_HOME", allow_module_level=True)

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "cuda"
HEADERS = "".join(path.read_text() for path in sorted(KERNELS.glob("*.h")))
REGISTERS = 65536  # of a multiprocessor, on every card since sm_80


def constant(name: str) -> int:
    return int(re.search(rf"constexpr int {name} = (\d+);", HEADERS)[1])


CAPABILITIES = pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "9.0a", "10.0a", "12.0"])


def compile_kernels(source: str, capability: str, folder: Path) -> tuple[dict, dict]:
    """Registers of every kernel, none of which may spill, and its PTX; by mangled name."""
    number = capability.replace(".", "")
    supported = subprocess.run(
        [NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True
    )
    if f"sm_{number.rstrip('a')}" not in supported.stdout.split():
        pytest.skip(f"this nvcc does not know sm_{number}")
    command = [NVCC, *build_backend.NVCC_FLAGS, *build_backend.nvcc_targets(capability)]
    command += ["--cubin", "-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
    command += [KERNELS / source, "-o", folder / "kernels.cubin"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    usage = re.findall(
        r"entry function '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        result.stderr,
        re.DOTALL,
    )
    blocks = constant("BLOCKS_PER_PROCESSOR")
    for kernel, *spilled, registers in usage:
        assert spilled == ["0"] * 3, f"{kernel}, sm_{number}: {spilled} bytes spilled"
        assert int(registers) * constant("THREADS") * blocks <= REGISTERS, f"{kernel}: {registers}"
    (ptx,) = folder.glob("*.ptx")
    bodies = re.split(r"\.visible \.entry (\w+)\(", ptx.read_text())[1:]
    used = {kernel: int(registers) for kernel, *_, registers in usage}
    return used, dict(zip(bodies[::2], bodies[1::2], strict=True))


@CAPABILITIES
def test_feature_kernels_fit_their_registers_and_load_16_bytes(capability, tmp_path):
    registers, ptx = compile_kernels("feature_alignment.cu", capability, tmp_path)
    assert len(registers) == 2
    (body,) = (body for kernel, body in ptx.items() if "align_rows" in kernel)
    # Nine pairs of dtypes, each with student, teacher and gradient.
    assert len(re.findall(r"ld\.global\S*\.v4", body)) >= 9 * 2 * constant("ELEMENTS") // 8
    assert len(re.findall(r"st\.global\S*\.v4", body)) >= 9 * constant("ELEMENTS") // 8
    assert not re.search(r"\.f64|\.local|atom", body), "row statistics are float32, sums ordered"


@CAPABILITIES
def test_projected_kernels_fit_their_registers_and_load_16_bytes(capability, tmp_path):
    registers, ptx = compile_kernels("projected_rows.cu", capability, tmp_path)
    assert len(registers) == 3
    kernels = [body for kernel, body in ptx.items() if "align_projected_rows" in kernel]
    assert len(kernels) == 2, "for a gradient in float32 and in bfloat16"
    # Against three dtypes of the teacher; eight elements are two loads of P, one of half precision.
    loads, stores = 3 * (2 + 1) * constant("ELEMENTS") // 8, 3 * constant("ELEMENTS_OF_OCTETS") // 8
    for body in kernels:
        assert len(re.findall(r"ld\.global\S*\.v4", body)) >= loads
        assert len(re.findall(r"st\.global\S*\.v4", body)) >= stores
        assert not re.search(r"\.f64|\.local|atom", body), "rows are float32, sums ordered"


@CAPABILITIES
def test_score_kernels_fit_their_registers_and_load_16_bytes(capability, tmp_path):
    registers, ptx = compile_kernels("dual_softmax.cu", capability, tmp_path)
    kernels = [kernel for kernel in registers if "score_rows" in kernel]
    # Three distances of logits, four of maps of scores and of probabilities.
    assert len(kernels) == 3 + 4 + 4
    assert len(registers) == len(kernels) + 2
    for kernel in kernels:
        body = ptx[kernel]
        # Of both sides, one load of half precision and two of float32; the gradient in either.
        assert len(re.findall(r"ld\.global\S*\.v4", body)) >= 2 * 2 * constant("OCTETS")
        assert len(re.findall(r"st\.\S*v4", body)) >= 3 * constant("OCTETS")
        assert not re.search(r"\.f64|\.local|atom", body), "rows are float32, sums ordered"


def test_architectures_by_torchs_variable():
    assert build_backend.nvcc_targets("8.0 9.0a+PTX") == [
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]",
    ]
    assert len(build_backend.nvcc_targets("")) == 6
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST must list .*: got 'Hopper'"):
        build_backend.nvcc_targets("Hopper")


def build_library(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """What pip does, without the C++ engine."""
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={folder}"]
    return subprocess.run(
        [*command, f"--build-temp={folder / 'temp'}"],
        env=os.environ | {"FAKD_CPU": "0", "TORCH_CUDA_ARCH_LIST": "9.0"} | variables,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
    )


LOAD = """
from pathlib import Path
from fakd_kernels import _extension
_extension.__file__ = sys.argv[1]
print(_extension._load("_C_cuda"))
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA, and may load it")
def test_library_is_built_and_a_torch_without_cuda_refuses_it_in_words(tmp_path):
    result = build_library(tmp_path, FAKD_CUDA="1")
    assert result.returncode == 0, result.stderr[-4000:]
    (built,) = tmp_path.rglob("_C_cuda*.so")
    needed = subprocess.run(["readelf", "-d", built], capture_output=True, text=True, check=True)
    assert "libtorch.so" in needed.stdout
    assert "libcud" not in needed.stdout, "the CUDA runtime is linked in, and nothing else of CUDA"
    command = [sys.executable, "-c", "import sys" + LOAD, built]
    words = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "_C_cuda.abi3.so cannot be loaded" in words
    assert "undefined symbol: aoti_torch_get_current_cuda_stream" in words
    assert "reinstall with the CUDA toolkit" in words


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA: auto builds")
@pytest.mark.parametrize("choice", ["0", "auto"])
def test_library_is_left_out_where_torch_has_no_cuda(choice, tmp_path):
    result = build_library(tmp_path, FAKD_CUDA=choice)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.rglob("*.so")) == []


@pytest.mark.parametrize("version", ["'13.0'", "None"])
def test_auto_follows_torch(version, tmp_path, monkeypatch):
    (tmp_path / "version.py").write_text(f"cuda: Optional[str] = {version}\nhip = '7.0'\n")
    monkeypatch.setattr(build_backend, "find_torch", lambda: tmp_path)
    monkeypatch.delenv("FAKD_CUDA", raising=False)
    assert build_backend.wants_cuda() == (version != "None")


def test_forced_build_fails_loudly(tmp_path):
    result = build_library(tmp_path, FAKD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    assert "no nvcc was found; CUDA_HOME names the folder" in result.stderr
    result = build_library(tmp_path, FAKD_CUDA="yes")
    assert result.returncode != 0
    assert "FAKD_CUDA must be 0, 1 or auto: got 'yes'" in result.stderr
