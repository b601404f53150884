"""Blocks for language models from any source."""

import pytest

from fakd import data
from tests.support.models import tiny_tokenizer
from tests.support.sources import own_caches, prepare, write
from tests.support.texts import words


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    own_caches(tmp_path, monkeypatch)


@pytest.fixture
def texts(tmp_path):
    """A folder of tiny texts: one set to train on, two held out."""
    for name, step in (("train", 3), ("alike", 3), ("other", 7)):
        (tmp_path / "texts" / name).mkdir(parents=True)
        for index in range(3):
            path = tmp_path / "texts" / name / f"{index}.txt"
            path.write_text(words(100 + index, step), encoding="utf-8")
    return tmp_path / "texts"


def test_blocks_of_texts_in_a_folder(texts):
    found = prepare(texts, "causal_lm", max_tokens=16)
    assert found.labels is None
    assert found.metrics == ("perplexity",)
    assert not found.is_greater_better
    assert found.train.column_names == ["input_ids"]
    assert len(found.train) == len(found.test) == 18
    assert list(found.more_tests) == ["other"]
    assert len(prepare(texts, "causal_lm", max_tokens=16, test_rows=5).more_tests["other"]) == 5
    assert found.describe() == (
        "texts: 18 blocks of 16 tokens to train on, 18 held out, 18 of other besides."
    )


def test_packed_texts(texts):
    found = prepare(texts, "causal_lm", max_tokens=16, layout="packed")
    assert len(found.train) == 303 // 16
    assert sum(position == 0 for row in found.train["position_ids"] for position in row) == 20
    batch = data.collate(tiny_tokenizer(), "causal_lm")([found.train[0], found.train[6]])
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]


def test_the_end_of_texts_is_held_out(texts):
    found = prepare(texts / "train" / "0.txt", "causal_lm", max_tokens=10)
    assert (len(found.train), len(found.test)) == (8, 2)
    ids = tiny_tokenizer()(words(100, 3), add_special_tokens=False)["input_ids"]
    assert [
        i for part in (found.train, found.test) for row in part["input_ids"] for i in row
    ] == ids


def test_texts_too_short_for_a_block_do_not_stop_the_rest(tmp_path):
    # Two batches of `map`, of which the first makes no block at all.
    rows = {"text": ["w1 w2"] * 1000 + [words(100, 3)] * 2}
    found = prepare(write(tmp_path / "a.jsonl", rows), "causal_lm", max_tokens=10)
    assert len(found.train) + len(found.test) == 20


@pytest.mark.parametrize("layout", ["blocks", "packed"])
def test_texts_that_fill_no_block(tmp_path, layout):
    path = write(tmp_path / "a.jsonl", {"text": ["w1 w2", "w3"]})
    with pytest.raises(ValueError, match=r"a must have .* of 10 tokens or more to fill a block of"):
        prepare(path, "causal_lm", max_tokens=10, layout=layout)


@pytest.mark.parametrize("options", [{"text_pair": "x"}, {"labels_per_class": 3}])
def test_settings_that_language_models_do_not_have(texts, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be absent for language mod"):
        prepare(texts, "causal_lm", **options)


def test_speeches(monkeypatch):
    corpus = data.Corpus(
        "speeches", [words(60, 3)], {"late": [words(30, 3)], "plays": [words(30, 7)]}
    )
    monkeypatch.setattr("fakd.data.sources.load_corpus", lambda: corpus)
    found = prepare("sotu", "causal_lm", max_tokens=10)
    assert (found.name, len(found.train), len(found.test)) == ("speeches", 6, 3)
    assert len(found.more_tests["plays"]) == 3
