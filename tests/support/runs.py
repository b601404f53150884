"""Whole trainings from the command line, on tiny models and texts."""

from pathlib import Path

from typer.testing import CliRunner

from fakd.cli import app
from tests.support.models import tiny_lm, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def make_assets(folder):
    """Texts of two classes, running text, and tiny teachers for both."""
    rows = [
        f'{{"text": "{" ".join(f"w{(i * k) % 25 + 25 * (i % 2)}" for k in range(2, 4 + i % 7))}", '
        f'"label": "{"ab"[i % 2]}"}}'
        for i in range(120)
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    text = " ".join(f"w{i * i % 43}" for i in range(1500))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    teacher = tiny_model(layers=4, labels=2)
    teacher.config.id2label, teacher.config.label2id = {0: "a", 1: "b"}, {"a": 0, "b": 1}
    teacher.save_pretrained(folder / "encoder")
    tiny_lm(layers=4).save_pretrained(folder / "lm")
    for name in ("encoder", "lm"):
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def settings(assets, output, task="classification", *more):
    """Arguments of `fakd train`."""
    flags = ["--task", task, "--student", "2", "--steps", "8", "--output", output]
    if task == "classification":
        flags += ["--teacher", assets / "encoder", "--data", assets / "rows.jsonl"]
        values = ["data.rows=6", "data.max_tokens=12", "distill.gamma=0.5", "distill.alpha=0.5"]
        values.append("student.width=8")
    else:
        flags += ["--teacher", assets / "lm", "--data", assets / "text.txt"]
        values = ["data.rows=4", "data.max_tokens=12", "distill.alpha=1", "distill.gamma=0.1"]
    values += ["train.checkpoint_every=2", "train.log_every=2", "train.learning_rate=0.01", *more]
    return [str(flag) for flag in flags] + [part for value in values for part in ("-s", value)]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
