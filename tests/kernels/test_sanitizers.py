"""The C++ engine, built with AddressSanitizer and UndefinedBehaviorSanitizer, on hostile input."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import build_backend
from tests.support.processor import processor_has

ROOT = Path(__file__).parents[2]

SETUP = """
import sys
import torch
from fakd_kernels import _extension
torch.ops.load_library(sys.argv[1])
_extension.cpu_absent = lambda: None
count = 0
"""
FEATURES = """
from tests.support.cases import CASES, make_inputs
for case in CASES:
    for dtypes in ((torch.float32,), (torch.float16,), (torch.bfloat16, torch.float32)):
        inputs = make_inputs(case, *dtypes)
        for route in ("direct", "gram") if case.projection != "none" else ("auto",):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                loss = inputs.call(engine="cpu", route=route).loss
                torch.autograd.grad(loss, list(inputs.leaves.values()))
                count += 1
"""
ATTENTION = """
from tests.support.attention_cases import CASES, make_inputs
float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
for case in CASES:
    for dtypes in ((float32,), (float16,), (bfloat16,), (bfloat16, float32)):
        inputs = make_inputs(case, *dtypes)
        for distance in ("kl", "reverse_kl", "mse", "jsd"):
            loss = inputs.call(engine="cpu", distance=distance).loss
            torch.autograd.grad(loss, list(inputs.leaves.values()))
            count += 1
from tests.kernels.test_attention_map_kl import CASES, make, results
for case in CASES:
    for kind in ("probabilities", "scores"):
        students, teachers, masks = make(case, kind)
        results(students, teachers, masks, {"inputs": kind} | case.options, "cpu")
        count += 1
"""
OUTPUTS = """
from tests.support import output_cases
for cases, make in (
    (output_cases.LINEAR_CASES, output_cases.make_linear),
    (output_cases.DENSE_CASES, output_cases.make_logits),
    (output_cases.TOPK_CASES, output_cases.make_topk),
):
    for case in cases:
        for dtypes in ("f32", "mixed", "bf16"):
            inputs = make(case, dtypes)
            loss = inputs.call(engine="cpu").loss
            torch.autograd.grad(loss, list(inputs.leaves.values()))
            count += 1
print(count, "calls were clean")
"""


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    compiler = shutil.which("g++")
    assert compiler, "g++ is needed to build the C++ engine with sanitizers"
    torch = build_backend.find_torch()
    library = tmp_path / "_C_cpu_sanitized.so"
    sources = [*sorted((ROOT / "csrc").glob("*.cpp")), *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fno-omit-frame-pointer"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{torch}/include"]
    flags += [f"-L{torch}/lib", "-ltorch_cpu", "-ltorch", "-o", library]
    subprocess.run([compiler, *sources, *flags], check=True, timeout=280)

    runtime = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtime),
        # The interpreter leaks by design, and torch pairs its own new with a free.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "PYTHONPATH": str(ROOT),
    }
    runs = {"": SETUP + FEATURES + ATTENTION + OUTPUTS}
    # What loads tiles is invisible to sanitizers; dot products on the same operands are not.
    if processor_has("avx512_bf16", "avx512dq"):
        runs["avx512_bf16"] = SETUP + ATTENTION + OUTPUTS
    for isa, script in runs.items():
        result = subprocess.run(
            [sys.executable, "-c", script, library],
            env=environment | {"FAKD_ISA": isa},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
        assert "calls were clean" in result.stdout
