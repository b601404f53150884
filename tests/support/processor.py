"""What the processor that runs the tests can do."""

from pathlib import Path


def processor_has(*flags: str) -> bool:
    """Whether Linux lists all of these among its features."""
    return set(flags) <= set(Path("/proc/cpuinfo").read_text().split())
