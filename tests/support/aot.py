"""What the tests ask of Triton kernels that are compiled for cards that are not here."""

from pathlib import Path

from benchmarks.aot import SHARED_BYTES, compile_variant, resource_usage
from fakd_kernels._triton import Variant


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
