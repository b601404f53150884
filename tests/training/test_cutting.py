"""Students cut from their teacher: blocks, widths, embeddings."""

import copy

import pytest
import torch

from fakd.architectures import find_blocks
from fakd.cutting import cut, kept_blocks
from tests.support.models import tiny_batch, tiny_lm, tiny_model
from tests.support.texts import tiny_blocks

ENCODERS = ("bert", "roberta", "distilbert", "mpnet", "deberta-v2", "electra", "modernbert")
DECODERS = ("gpt2", "llama", "mistral", "qwen3", "gemma2", "gpt_neox", "phi", "opt")


def tiny_decoder(family: str, **options):
    """Four heads of 8, two groups of keys where the family has groups."""
    grouped = {"num_key_value_heads": 2} if family not in ("gpt2", "gpt_neox", "opt") else {}
    head = {"head_dim": 8} if family in ("gemma2", "qwen3", "mistral") else {}
    opt = {"ffn_dim": 64, "word_embed_proj_dim": 32} if family == "opt" else {}
    sizes = {"num_attention_heads": 4, **grouped, **head, **opt}
    return tiny_lm(family, width=32, **sizes, **options)


def test_kept_blocks():
    assert kept_blocks(30, 8) == [0, 4, 8, 12, 17, 21, 25, 29]
    assert kept_blocks(6, 2) == [0, 5]
    assert kept_blocks(6, 6) == list(range(6))
    assert kept_blocks(6, 1) == [5]
    assert kept_blocks(6, [1, 3, 6]) == [0, 2, 5]
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"layers must be from 1 to 6, .* got {count}"):
            kept_blocks(6, count)
    for listed in ([], [0, 1], [2, 1], [1, 1], [5, 7]):
        with pytest.raises(ValueError, match="layers must be ascending numbers from 1 to 6"):
            kept_blocks(6, listed)


@pytest.mark.parametrize("family", DECODERS)
def test_blocks_of_a_language_model(family):
    teacher = tiny_decoder(family)
    before = copy.deepcopy(teacher.state_dict())
    ids = tiny_blocks()
    whole = cut(teacher, range(6))
    torch.testing.assert_close(whole(input_ids=ids).logits, teacher(input_ids=ids).logits)

    student = cut(teacher, [0, 3, 5])
    assert not student.training
    assert student.config.num_hidden_layers == 3
    ours = find_blocks(student).modules
    theirs = find_blocks(teacher).modules
    for block, index in zip(ours, (0, 3, 5), strict=True):
        for own, copied in zip(block.parameters(), theirs[index].parameters(), strict=True):
            assert torch.equal(own, copied)
    tied = teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    is_tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert is_tied == tied
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.config.num_hidden_layers == 6


@pytest.mark.parametrize("family", ENCODERS)
def test_blocks_of_a_classifier(family):
    teacher, batch = tiny_model(family, labels=3), tiny_batch()
    whole = cut(teacher, range(4))
    torch.testing.assert_close(whole(**batch).logits, teacher(**batch).logits)
    student = cut(teacher, [0, 2])
    assert type(student) is type(teacher)
    assert len(find_blocks(student)) == 2
    ours, theirs = student.state_dict(), teacher.state_dict()
    heads = [name for name in ours if "classifier" in name]
    assert heads
    assert all(torch.equal(ours[name], theirs[name]) for name in heads)
    assert student(**batch).logits.shape == (3, 3)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_narrower(family, tmp_path):
    if family in DECODERS:
        teacher, batch = tiny_decoder(family), {"input_ids": tiny_blocks()}
    else:
        teacher = tiny_model(family, labels=3, width=32, num_attention_heads=4, **_inner(family))
        batch = tiny_batch()
    student = cut(teacher, [0, 2], width=16)
    settings = student.config
    assert (settings.num_hidden_layers, settings.hidden_size) == (2, 16)
    assert settings.num_attention_heads == 2
    if getattr(teacher.config, "num_key_value_heads", None) == 2:
        assert settings.num_key_value_heads == 1
    logits = student(**batch).logits
    assert logits.shape == teacher(**batch).logits.shape
    assert student.num_parameters() < teacher.num_parameters() / 2
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)(**batch).logits
    torch.testing.assert_close(again, logits)


def _inner(family: str) -> dict:
    return {"hidden_dim": 64} if family == "distilbert" else {"embedding_size": 32}


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_keep_the_geometry_of_the_teacher(tied):
    # All of the variance lies in 16 of 32 axes, so none is lost.
    teacher = tiny_decoder("llama", tie_word_embeddings=tied)
    with torch.no_grad():
        words, head = teacher.get_input_embeddings().weight, teacher.get_output_embeddings().weight
        plane = torch.linalg.qr(torch.randn(32, 32)).Q[:, :16]
        for weight in {id(words): words, id(head): head}.values():
            weight.copy_(torch.randn(60, 16) @ plane.T)
    student = cut(teacher, [0, 1], width=16)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        ours, theirs = (getattr(model, name)().weight for model in (student, teacher))
        torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=1e-3, atol=1e-4)


def test_blocks_of_a_narrower_student_are_drawn():
    teacher = tiny_decoder("llama")
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(cut(teacher, [0, 1], width=16).model.layers[0].mlp.up_proj.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_groups_of_keys_divide_the_heads():
    teacher = tiny_lm(width=72, num_attention_heads=9, num_key_value_heads=3)
    for width, groups in ((48, 2), (40, 1), (32, 1), (24, 1)):
        student = cut(teacher, [0, 1], width=width)
        assert student.config.num_key_value_heads == groups
        assert student.config.head_dim == 8
        student(input_ids=tiny_blocks())


@pytest.mark.parametrize("width", [20, 72, 0])
def test_impossible_widths(width):
    teacher = tiny_model(width=64, num_attention_heads=8)
    with pytest.raises(ValueError, match=rf"multiple of 8, .* at most 64: got {width}"):
        cut(teacher, [0], width)


def test_blocks_that_cannot_be_cut():
    with pytest.raises(ValueError, match="AlbertForSequenceClassification, which runs some twice"):
        cut(tiny_model("albert", labels=3), [0, 1])
    # The first block of ModernBERT has no norm before its attention.
    with pytest.raises(ValueError, match=r"block 3 of ModernBert.* must fit in the place of block"):
        cut(tiny_model("modernbert", labels=3), [2, 3])
    with pytest.raises(ValueError, match="word embeddings as wide as its hidden states"):
        cut(tiny_model("electra", labels=3), [0, 1], width=8)


def test_dtype_and_settings_are_the_teachers():
    teacher = tiny_decoder("llama").to(torch.bfloat16)
    teacher.generation_config.max_new_tokens = 7
    for width in (None, 16):
        student = cut(teacher, [0, 1], width)
        assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
        assert student.generation_config.max_new_tokens == 7
