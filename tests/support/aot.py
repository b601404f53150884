"""Triton kernels compiled for cards that are not here: what registers, memory and PTX tell.

Needs no card, but a process without TRITON_INTERPRET: the interpreter compiles nothing.
"""

import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fakd_kernels._triton import Variant

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


def compile_variant(variant: Variant, capability: int):
    signature = variant.signature | dict.fromkeys(variant.constants, "constexpr")
    # As at run time, where torch's allocations begin on 16 bytes.
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(variant.signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(variant.kernel, signature, variant.constants, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resource_usage(compiled, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and the bytes that spill from them."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def check(name: str, variant: Variant, capability: int, folder: Path, spill_limit: int = 0):
    """The compiled kernel, which must neither spill nor ask for more memory than the card has."""
    compiled = compile_variant(variant, capability)
    registers, spilled = resource_usage(compiled, folder)
    assert spilled <= spill_limit, (
        f"{name}, sm_{capability}: {spilled} bytes spilled of {registers} registers"
    )
    limit = SHARED_BYTES[capability]
    assert compiled.metadata.shared <= limit, (
        f"{name}, sm_{capability}: {compiled.metadata.shared} bytes of shared memory, limit {limit}"
    )
    return compiled
