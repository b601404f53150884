"""A stored teacher teaches what the teacher itself does, and no other training."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fakd.config_file import load_config
from fakd.data import collate, prepare
from fakd.teacher_cache import (
    RowsWithTeacher,
    TeacherCache,
    collate_with_teacher,
    hash_weights,
)
from tests.support.models import tiny_tokenizer
from tests.support.runs import invoke, make_assets


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


# The teacher and the texts of each.
TASKS = {"classification": ("encoder", "rows.jsonl"), "causal_lm": ("lm", "text.txt")}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Settings of both tasks: texts, and a tiny teacher for each."""
    folder = make_assets(tmp_path_factory.mktemp("assets"))
    for task, (teacher, source) in TASKS.items():
        top_k = 5 if task == "causal_lm" else "null"
        lines = [
            f"task: {task}",
            f"teacher: {folder / teacher}",
            "student: {layers: 2}",
            f"data: {{source: {folder / source}, max_tokens: 12, rows: 4}}",
            "steps: 6",
            "output: none",
            f"distill: {{alpha: 1, temperature: 2, beta: 0, delta: 0, top_k: {top_k}}}",
            "train: {learning_rate: 0.01}",
        ]
        (folder / f"{task}.yaml").write_text("\n".join(lines), encoding="utf-8")
    return folder


def run(command, assets, task, *values):
    settings = [part for value in values for part in ("-s", value)]
    result = invoke(command, assets / f"{task}.yaml", *settings)
    return result, " ".join(result.output.split())


@pytest.fixture(scope="module")
def caches(assets, tmp_path_factory):
    folders = {}
    for task in ("classification", "causal_lm"):
        folders[task] = tmp_path_factory.mktemp("caches") / task
        result, shown = run("cache-teacher", assets, task, f"teacher_cache={folders[task]}")
        assert result.exit_code == 0, shown
        assert "will hold 0.0 MB" in shown
        folders[f"{task} with states"] = folders[task].parent / "states"
        values = [f"teacher_cache={folders[f'{task} with states']}", *STATES]
        result, shown = run("cache-teacher", assets, task, *values)
        assert result.exit_code == 0, shown
    return folders


STATES = ["distill.beta=1", "distill.delta=0.5"]


@pytest.mark.parametrize("more", [[], STATES, [*STATES, "distill.alpha=0"]])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_training_from_the_cache_is_training_with_the_teacher(assets, caches, tmp_path, task, more):
    online, offline = tmp_path / "online", tmp_path / "offline"
    result, shown = run("train", assets, task, f"output={online}", *more)
    assert result.exit_code == 0, shown
    cache = caches[f"{task} with states" if more else task]
    if "distill.alpha=0" in more and task == "causal_lm":
        cache = tmp_path / "states alone"
        assert run("cache-teacher", assets, task, f"teacher_cache={cache}", *more)[0].exit_code == 0
    values = [f"output={offline}", f"teacher_cache={cache}", *more]
    result, shown = run("train", assets, task, *values)
    assert result.exit_code == 0, shown
    ours, theirs = (load_file(f / "student" / "model.safetensors") for f in (offline, online))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    logs = [
        [json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()]
        for f in (offline, online)
    ]
    terms = [name for name in ("soft", "cosine", "euclidean") if name in logs[1][-1]]
    assert len(terms) == (1 if not more else 3 if len(more) == 2 else 2)
    for term in terms:
        assert logs[0][-1][term] == pytest.approx(logs[1][-1][term], rel=1e-3)
        assert logs[0][-1][term] > 0
    results = [json.loads((f / "results.json").read_text()) for f in (offline, online)]
    assert results[0]["teacher"] == results[1]["teacher"]


def test_entries_are_the_teachers_own(assets, caches):
    cache = TeacherCache(caches["classification"])
    teacher = AutoModelForSequenceClassification.from_pretrained(assets / "encoder").eval()
    prepared = prepare(
        load_config(assets / "classification.yaml").data, "classification", tiny_tokenizer()
    )
    assert cache.identity.rows == len(prepared.train)
    batch = collate(tiny_tokenizer(), "classification")([prepared.train[3]])
    with torch.no_grad():
        logits = teacher(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
    torch.testing.assert_close(cache[3]["teacher_logits"], logits)
    tokens = TeacherCache(caches["causal_lm"])[1]
    assert tokens["teacher_indices"].shape == tokens["teacher_logprobs"].shape == (12, 5)
    assert (tokens["teacher_logprobs"].exp().sum(1) <= 1 + 1e-5).all()
    assert (tokens["teacher_logprobs"].diff(dim=1) <= 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_lie_where_the_tokens_do(assets, caches, side):
    cache = TeacherCache(caches["classification with states"])
    assert list(cache.identity.layers) == [2, 4]
    cache.check(dataclasses.replace(cache.identity, layers=[4]))  # it may hold more
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    prepared = prepare(
        load_config(assets / "classification.yaml").data, "classification", tokenizer
    )
    collator = collate_with_teacher(collate(tokenizer, "classification"))
    rows = RowsWithTeacher(prepared.train, cache)
    batch = collator([rows[index] for index in (0, 5, 7)])
    assert "teacher_state_2" not in batch
    teacher = AutoModelForSequenceClassification.from_pretrained(assets / "encoder").eval()
    entries = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mask = entries["attention_mask"].bool()
    assert not mask.all()
    if side == "right":  # positions move with the padding otherwise
        with torch.no_grad():
            states = teacher(**entries, output_hidden_states=True).hidden_states[4]
        torch.testing.assert_close(batch["teacher_state_4"][mask], states[mask])
    assert (batch["teacher_state_4"][~mask] == 0).all()
    for place, index in enumerate((0, 5, 7)):
        stored = cache[index]["teacher_state_4"]
        assert torch.equal(batch["teacher_state_4"][place][mask[place]], stored)


def test_states_in_half_the_bytes(assets, caches, tmp_path):
    values = [f"teacher_cache={tmp_path}", "teacher_cache_dtype=bfloat16", *STATES]
    result, shown = run("cache-teacher", assets, "causal_lm", *values)
    assert result.exit_code == 0, shown
    name = "teacher_state_2"
    half, whole = (
        load_file(folder / "rows-00000.safetensors")[name]
        for folder in (tmp_path, caches["causal_lm with states"])
    )
    assert torch.equal(half, whole.bfloat16())
    result, shown = run("train", assets, "causal_lm", *values, f"output={tmp_path / 'run'}")
    assert result.exit_code == 0, shown


def test_a_cache_that_was_interrupted_goes_on(assets, caches, tmp_path):
    """A shard that is there is not computed again; half of one is."""
    folder = tmp_path / "cache"
    run("cache-teacher", assets, "causal_lm", f"teacher_cache={folder}")
    shard = folder / "rows-00000.safetensors"
    before, written = load_file(shard), shard.stat().st_mtime_ns
    (folder / "manifest.json").unlink()
    run("cache-teacher", assets, "causal_lm", f"teacher_cache={folder}")
    assert shard.stat().st_mtime_ns == written
    shard.rename(folder / "rows-00000.part")
    run("cache-teacher", assets, "causal_lm", f"teacher_cache={folder}")
    after = load_file(shard)
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert not (folder / "rows-00000.part").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["distill.top_k=6"], "top_k: 6, was 5"),
        (["data.max_tokens=8"], "data: "),
        (["distill.gamma=1"], "distill must learn from predictions or hidden states"),
        (["distill.beta=1"], "layers: [2, 4], was []"),
        (["distill.alpha=0"], "distill must learn from predictions or hidden states"),
        (["distill.top_k=null"], "distill.top_k must be given"),
    ],
)
def test_another_training_is_refused(assets, caches, tmp_path, values, message):
    more = [f"output={tmp_path / 'run'}", f"teacher_cache={caches['causal_lm']}"]
    result, shown = run("train", assets, "causal_lm", *more, *values)
    assert result.exit_code == 2, shown
    assert message in shown
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_damaged_cache_is_refused(assets, caches, tmp_path):
    folder = tmp_path / "cache"
    run("cache-teacher", assets, "causal_lm", f"teacher_cache={folder}")
    shard = folder / "rows-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + b"abcd")
    more = [f"output={tmp_path / 'run'}", f"teacher_cache={folder}"]
    result, shown = run("train", assets, "causal_lm", *more)
    assert result.exit_code == 2
    assert "teacher_cache must have rows-00000.safetensors as it was written" in shown
    result, shown = run("train", assets, "causal_lm", more[0], f"teacher_cache={tmp_path}")
    assert result.exit_code == 2
    assert "teacher_cache must be a folder that fakd cache-teacher wrote" in shown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_of_weights_sees_every_bit_and_place(dtype):
    model = torch.nn.Linear(7, 5, dtype=dtype)  # no whole number of words
    before = hash_weights(model)
    assert hash_weights(copy.deepcopy(model)) == before
    with torch.no_grad():
        for index in [(0, 0), (2, 3), (4, 6)]:
            changed = copy.deepcopy(model)
            changed.weight[index] *= 1.01
            assert hash_weights(changed) != before
        changed = copy.deepcopy(model)
        changed.weight.copy_(model.weight.flip(1))
        assert hash_weights(changed) != before


def test_the_folder_must_be_named_and_be_one(assets):
    result, shown = run("cache-teacher", assets, "causal_lm")
    assert result.exit_code == 2
    assert "teacher_cache must name the folder to write" in shown
    result, shown = run(
        "cache-teacher", assets, "causal_lm", f"teacher_cache={assets / 'text.txt'}"
    )
    assert result.exit_code == 2
    assert "teacher_cache must be a folder that can be written: got" in shown
    assert "Errno" not in shown
