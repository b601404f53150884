"""The house rules that ruff cannot see."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fakd", "fakd_kernels", "benchmarks", "tests")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
MOST_LINES = 350


def imported_modules(path: Path) -> set[str]:
    """Absolute names of what a file imports, relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def imports_of(folder: str) -> list[tuple[Path, str]]:
    return [
        (path, name)
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in imported_modules(path)
    ]


def test_kernels_know_nothing_of_models_or_training():
    for path, name in imports_of("fakd_kernels"):
        assert not re.match(r"(fakd|transformers|datasets|benchmarks|tests)(\.|$)", name), (
            path,
            name,
        )


def test_training_uses_public_names_of_the_kernels_only():
    for path, name in imports_of("fakd"):
        if name.startswith("fakd_kernels"):
            assert not re.search(r"\._|\.ops(\.|$)", name), (path, name)


def test_op_folders_do_not_import_each_other():
    for path, name in imports_of("fakd_kernels/ops"):
        own = path.relative_to(ROOT / "fakd_kernels/ops").parts[0]
        match = re.match(r"fakd_kernels\.ops\.(\w+)", name)
        assert match is None or match[1] == own, (path, name)


def test_importing_the_kernels_needs_torch_only():
    script = (
        "import sys; import fakd_kernels; "
        "loaded = {'triton', 'transformers', 'datasets', 'accelerate'} & set(sys.modules); "
        "assert 'transformers' not in loaded and 'datasets' not in loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("path", [*SOURCES, *CSRC], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_name_no_machine(path):
    text = path.read_text()
    assert text.count("\n") <= MOST_LINES, "split it, by purpose"
    assert not re.search(r"[\"'\s=(]/(?:work|root|home|mnt)/", text)
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text.replace("(TODO|FIXME|XXX)", ""))


@pytest.mark.parametrize("arguments", [["check", "."], ["format", "--check", "."]])
def test_ruff(arguments):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
