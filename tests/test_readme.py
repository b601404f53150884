"""README: every block runs, and what it says of the tree and of the figures is so."""

import re
from pathlib import Path

import pytest
import typer

from fakd.cli import app
from fakd.config_file import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


# The Trainer of transformers pins memory by default, which only machines with a GPU can.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
def test_python_blocks_run_in_order(capsys, monkeypatch, tmp_path):
    """As one session, the way a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    assert len(blocks("python")) >= 4
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "served by the cpu engine" in printed
    assert "weighted_cosine" in printed


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^)make (\w+)", README, flags=re.MULTILINE))
    assert {"demo", "test", "bench", "lint"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    pyproject = (ROOT / "pyproject.toml").read_text()
    for command in "".join(blocks("bash")).splitlines():
        for extra in re.findall(r"\.\[(\w+)\]", command):
            assert f"\n{extra} = [" in pyproject


def test_fakd_commands_and_their_options_exist():
    commands = typer.main.get_command(app).commands
    told = re.findall(r"(?:^|`)fakd ([a-z-]+)([^`\n]*(?:\\\\\n[^`\n]*)*)", README, re.MULTILINE)
    assert {name for name, _ in told} >= {"train", "eval", "report", "cache-teacher", "doctor"}
    for name, arguments in told:
        options = {option for p in commands[name].params for option in p.opts}
        assert set(re.findall(r"--[a-z-]+", arguments)) <= options, (name, arguments)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_are_settings(path):
    assert load_config(path).output.parent.name == "outputs"


def test_versions_are_those_of_pyproject():
    pyproject = (ROOT / "pyproject.toml").read_text()
    sentence = r"Python ([\d.]+) or newer and torch ([\d.]+) or newer"
    python, torch = re.search(sentence, README).groups()
    assert f'requires-python = ">={python}"' in pyproject
    assert f'dependencies = ["torch>={torch}"]' in pyproject


@pytest.mark.parametrize("name", re.findall(r"^(\w+)/ ", blocks("")[0], flags=re.MULTILINE))
def test_folders_exist(name):
    assert (ROOT / name).is_dir()


def test_ops_of_the_table_are_public():
    import fakd_kernels

    table = README.split("## The ops")[1].split("\n\n")[1]
    ops = re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)
    assert ops
    for op in ops:
        assert callable(getattr(fakd_kernels, op))
