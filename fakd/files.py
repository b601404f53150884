"""Files that are there whole or not at all, and outlast a power cut."""

import hashlib
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write beside the file, sync, then rename."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)


def sync_folder(folder: Path) -> None:
    """Make a folder's files and names outlast a power cut."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Make what was written to a file, or the names in a folder, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """Size and SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            total.update(part)
    return f"{path.stat().st_size}:{total.hexdigest()}"
