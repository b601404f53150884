"""Triton kernels compiled for cards that are not here: what registers, memory and PTX tell.

python -m benchmarks.aot writes benchmarks/results/aot.json and benchmarks/GPU.md. Needs no card,
but a process without TRITON_INTERPRET: the interpreter compiles nothing.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fakd_kernels._triton import Variant

from .record import RESULTS
from .variants import of_every_op

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # of one program, at most
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
# Of a multiprocessor: registers alike on all; a program takes 1 KiB more of shared memory than its
# own; threads at most.
REGISTERS, RESERVED_BYTES = 65536, 1024
THREADS = {80: 2048, 90: 2048, 100: 2048, 120: 1536}
FACTS = RESULTS / "aot.json"
PAGE = RESULTS.parent / "GPU.md"


def compile_variant(variant: Variant, capability: int):
    signature = variant.signature | dict.fromkeys(variant.constants, "constexpr")
    # As at run time, where torch's allocations begin on 16 bytes.
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(variant.signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(variant.kernel, signature, variant.constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=variant.options)


def resource_usage(compiled, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and the bytes that spill from them."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def resident_warps(capability: int, registers: int, shared: int, warps: int) -> int:
    """Warps of a multiprocessor at once: as many programs as registers, memory, threads allow."""
    allotted = -(-registers // 8) * 8  # of a thread, in steps of eight
    programs = min(
        REGISTERS // (32 * warps * allotted),
        (SHARED_BYTES[capability] + RESERVED_BYTES) // (shared + RESERVED_BYTES),
        THREADS[capability] // (32 * warps),
    )
    return programs * warps


def facts() -> list[dict]:
    """A line per kernel and architecture."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for capability in SHARED_BYTES:
            for op, kernel, variant in of_every_op(capability):
                compiled = compile_variant(variant, capability)
                registers, spilled = resource_usage(compiled, Path(folder))
                shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
                lines.append(
                    {
                        "op": op,
                        "kernel": kernel,
                        "capability": capability,
                        "registers": registers,
                        "spilled_bytes": spilled,
                        "shared_bytes": shared,
                        "warps": warps,
                        "resident_warps": resident_warps(capability, registers, shared, warps),
                        "has_tensor_cores": TENSOR_CORE[capability] in compiled.asm["ptx"],
                    }
                )
    return lines


def page(record: dict) -> str:
    """A table per op, a column per architecture."""
    lines = [
        "# GPU kernels",
        "",
        "The kernels ran on an H100 and an H200; [README](README.md) has what was timed there.",
        "This is what compilers say, in bfloat16 at sizes of large models: registers of a thread,",
        "shared memory of a program in KiB, warps that a multiprocessor holds at once (of 64, on",
        "sm_120 of 48), and whether tensor cores are used. `make bench-gpu` measures.",
        "",
        f"Written by `python -m benchmarks.aot` with Triton {record['triton']}.",
    ]
    cards = list(SHARED_BYTES)
    for op in dict.fromkeys(line["op"] for line in record["kernels"]):
        mine = [line for line in record["kernels"] if line["op"] == op]
        lines += ["", f"| `{op}` | {' | '.join(f'sm_{card}' for card in cards)} |"]
        lines.append("|---" * (1 + len(cards)) + "|")
        for kernel in dict.fromkeys(line["kernel"] for line in mine):
            cells = [_cell(line) for line in mine if line["kernel"] == kernel]
            lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(line: dict) -> str:
    words = f"{line['registers']} registers, {line['shared_bytes'] / 1024:.0f} KiB, "
    words += f"{line['resident_warps']} warps"
    words += f", {line['spilled_bytes']} bytes spilled" if line["spilled_bytes"] else ""
    return words + (", tensor cores" if line["has_tensor_cores"] else "")


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__).parse_args()
    record = {"triton": triton.__version__, "kernels": facts()}
    FACTS.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
