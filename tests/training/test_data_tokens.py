"""Token ids: made once, kept whole; and tokenizers that are compared."""

import copy
import json

import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fakd import data
from fakd.data.tokens import encode_once, hash_rows
from tests.support.models import tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fakd" / "tokens"


def some_rows(count: int = 5) -> Dataset:
    return Dataset.from_dict({"text": [f"w{index}" for index in range(count)]})


class Counted:
    """Lengths of texts; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, rows: dict) -> dict:
        self.calls += 1
        return {"input_ids": [[len(text)] for text in rows["text"]]}


def test_encoded_once(cache):
    encode = Counted()
    first, key = encode_once(some_rows(), encode, {"max": 1})
    assert first["input_ids"][:] == [[2]] * 5
    assert encode.calls == 1
    again, same = encode_once(some_rows(), encode, {"max": 1})
    assert (encode.calls, same) == (1, key)
    assert again["input_ids"][:] == first["input_ids"][:]
    assert [path.name for path in cache.iterdir()] == [f"{key}.arrow"]


def test_other_rows_or_settings_are_encoded_again():
    encode = Counted()
    keys = {encode_once(some_rows(), encode, {"max": 1})[1]}
    keys.add(encode_once(some_rows(), encode, {"max": 2})[1])
    keys.add(encode_once(some_rows(4), encode, {"max": 1})[1])
    assert len(keys) == encode.calls == 3


def test_an_interrupted_run_leaves_no_cache(cache):
    rows = some_rows(3000)
    calls = 0

    def interrupted(batch: dict) -> dict:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return {"input_ids": [[1]] * len(batch["text"])}

    with pytest.raises(KeyboardInterrupt):
        encode_once(rows, interrupted, {})
    assert list(cache.glob("*.arrow")) == []
    encoded, _ = encode_once(rows, Counted(), {})
    assert len(encoded) == 3000
    assert encoded[2999] == {"input_ids": [5]}


def test_hash_of_rows_depends_on_the_contents_alone():
    rows = some_rows(30)
    assert hash_rows(rows) == hash_rows(some_rows(60).select(range(30)))
    assert hash_rows(rows) != hash_rows(some_rows(29))
    assert hash_rows(rows) != hash_rows(rows.rename_column("text", "other"))
    assert hash_rows(rows) != hash_rows(rows.select(range(29, -1, -1)))


def test_hash_of_a_tokenizer_forgets_its_calls():
    tokenizer = tiny_tokenizer()
    before = data.tokenizer_hash(tokenizer)
    tokenizer(["w1", "w2 w3"], truncation=True, max_length=3, padding=True)
    assert data.tokenizer_hash(tokenizer) == before == data.tokenizer_hash(tiny_tokenizer())
    assert data.tokenizer_hash(changed(lambda state: state.update(normalizer=LOWER))) != before


LOWER = {"type": "Lowercase"}


def changed(change) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with another state."""
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state)
    special = {name: getattr(tokenizer, f"{name}_token") for name in ("pad", "cls", "sep", "unk")}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **{f"{name}_token": token for name, token in special.items()},
    )


def swap_words(state: dict) -> None:
    words = state["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]


def test_equal_tokenizers():
    ours = tiny_tokenizer()
    ours(["w1"], truncation=True, max_length=3)
    data.check_tokenizers(ours, tiny_tokenizer())
    data.check_tokenizers(ours, changed(lambda _: None))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (swap_words, "the token 'w1', which is 5 and 6"),
        (lambda s: s["model"]["vocab"].pop("w55"), "60 and 59 tokens"),
        (lambda s: s.update(normalizer=LOWER), r"a normalizer of .* \(none and Lowercase\)"),
        (
            lambda s: s.update(pre_tokenizer={"type": "WhitespaceSplit"}),
            r"a pre_tokenizer of .* \(Whitespace and WhitespaceSplit\)",
        ),
        (lambda s: s["post_processor"]["single"].pop(), "a post_processor of unlike settings"),
    ],
)
def test_unequal_tokenizers(change, difference):
    with pytest.raises(ValueError, match=f"must have equal tokenizers: got {difference}"):
        data.check_tokenizers(tiny_tokenizer(), changed(change))


def test_special_tokens_are_compared():
    other = copy.deepcopy(tiny_tokenizer())
    other.pad_token = "[UNK]"
    with pytest.raises(ValueError, match=r"pad_token '\[PAD\]' and '\[UNK\]'; choose a student"):
        data.check_tokenizers(tiny_tokenizer(), other)
