"""Comparisons: whole ones on tiny models and texts, and settings that cannot be."""

import json

import pytest
import yaml

from fakd.compare import load_comparison, plan_trainings
from fakd.config_file import ConfigError
from fakd.demo import load_demo
from tests.support.models import tiny_lm, tiny_model, tiny_tokenizer
from tests.support.runs import invoke
from tests.support.sources import own_caches
from tests.support.texts import words

ARMS = {
    "labels only": {"distill": {"beta": 0, "delta": 0}},
    "labels + features": {},
    "all": {"distill": {"gamma": 0.5}},
}


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    own_caches(tmp_path, monkeypatch)


@pytest.fixture
def folder(tmp_path):
    """An encoder, a language model, texts of two classes, and running text."""
    tiny_model(layers=4).save_pretrained(tmp_path / "encoder")
    tiny_lm().save_pretrained(tmp_path / "lm")
    for name in ("encoder", "lm"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    rows = [f"w{i % 25 + 25 * (i % 2)} w{i % 7} w{i % 11} x{i},{'ab'[i % 2]}" for i in range(150)]
    (tmp_path / "tiny.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    for name, step in (("train", 3), ("alike", 3), ("other", 7)):
        (tmp_path / "texts" / name).mkdir(parents=True)
        text = "\n".join(words(100 + index, step) for index in range(3))
        (tmp_path / "texts" / name / "a.txt").write_text(text, encoding="utf-8")
    return tmp_path


def write(folder, **changes):
    """A comparison of classifiers, the teacher's own training among them."""
    data = {"source": str(folder / "tiny.csv"), "max_tokens": 8, "rows": 8}
    settings = {
        "title": "Tiny",
        "output": str(folder / "out"),
        "seeds": 2,
        "teacher": {
            "task": "classification",
            "teacher": None,
            "student": {"path": str(folder / "encoder"), "pooling": "mean"},
            "data": data,
            "steps": 4,
        },
        "base": {
            "task": "classification",
            "student": {"layers": 2, "width": 8},
            "data": data,
            "steps": 6,
        },
        "arms": ARMS,
        "cost_of": "labels + features",
        "timed_steps": 1,
    } | changes
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


def test_a_whole_comparison(folder):
    path = write(folder)
    result = invoke("compare", path)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    for text in ("labels + features against labels only", "all against labels + features", "fused"):
        assert text in shown
    # What was found once is not found again; the teacher was a student itself.
    assert shown.count("student at the start: accuracy") == 1 + 2
    assert shown.count(" teacher: accuracy") == 2
    output = folder / "out"
    runs = sorted(part.name for part in output.iterdir() if part.is_dir())
    names = [
        f"{arm}-{seed}" for arm in ("all", "labels-features", "labels-only") for seed in (0, 1)
    ]
    assert runs == sorted([*names, "teacher"])
    records = {name: json.loads((output / name / "results.json").read_text()) for name in names}
    for seed in (0, 1):
        starts = [records[name]["start"] for name in names if name.endswith(str(seed))]
        assert all(start == starts[0] for start in starts)
    assert records["all-0"]["pairs"] == [[1, 2], [2, 4]]
    line = json.loads((output / "all-0" / "log.jsonl").read_text().splitlines()[-1])
    assert {"task", "cosine", "euclidean", "attention"} <= set(line)
    assert (output / "report.html").read_text().count("<svg") == 2
    # The same command again trains nothing, and says the same.
    again = invoke("compare", path)
    assert again.exit_code == 0, again.output
    assert "accuracy" in again.output
    assert {n: json.loads((output / n / "results.json").read_text())["student"] for n in names} == {
        n: records[n]["student"] for n in names
    }


def test_language_models_without_a_training_of_the_teacher(folder):
    data = {"source": str(folder / "texts"), "max_tokens": 16, "rows": 4}
    base = {
        "task": "causal_lm",
        "teacher": str(folder / "lm"),
        "student": {"layers": 2},
        "data": data,
        "steps": 3,
    }
    arms = {"plain": ARMS["labels only"], "distilled": {"distill": {"alpha": 1}}}
    path = write(folder, teacher=None, base=base, arms=arms, seeds=1, cost_of=None)
    result = invoke("compare", path)
    assert result.exit_code == 0, result.output
    assert "distilled against plain (other):" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "arms must name at least one"),
        ({"cost_of": "none"}, "cost_of must be one of the arms"),
        ({"seeds": 0}, "seeds must be > 0"),
        ({"arms": {"a b": {}, "a+b": {}}}, "arms must have names of unequal letters"),
        ({"arms": {"a": {"distil": {}}}}, "a: settings must be known: got distil; did you mean"),
        ({"arms": {"a": {"output": "x"}}}, "a.output must be left out"),
        ({"sead": 1}, "did you mean seeds?"),
    ],
)
def test_comparisons_that_cannot_be(folder, changes, message):
    changes = {"cost_of": None, **changes}
    result = invoke("compare", write(folder, **changes))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not (folder / "out").exists()


def test_settings_of_one_training_change_by_name(folder):
    config = load_comparison(write(folder), ["base.steps=9", "teacher.train.learning_rate=1"])
    planned = plan_trainings(config)
    assert planned.teacher.train.learning_rate == 1
    assert [each.steps for each in planned.arms["all"]] == [9, 9]
    assert [each.train.seed for each in planned.arms["all"]] == [0, 1]
    assert planned.arms["all"][1].teacher == str(folder / "out" / "teacher" / "student")


@pytest.mark.parametrize("name", ["r8", "sotu"])
@pytest.mark.parametrize("is_quick", [True, False])
def test_demos_are_comparisons(name, is_quick):
    config = load_demo(name, ["seeds=3"], is_quick=is_quick)
    planned = plan_trainings(config)
    assert all(len(runs) == 3 for runs in planned.arms.values())
    with pytest.raises(ConfigError, match="settings must be known"):
        plan_trainings(load_demo(name, ["base.nonsense=1"]))
