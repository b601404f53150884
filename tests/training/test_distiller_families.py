"""The Distiller on models that wrap others, or read two sequences: each entry reaches its model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    FalconConfig,
    FalconForSequenceClassification,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from fakd import AttentionKLLoss, DistillConfig, Distiller, FeatureAlignmentLoss
from fakd.lm_head import check_lm_head, find_lm_head, is_causal_lm
from fakd.losses import LinearKLLoss, LogitKLLoss
from fakd.terms import build_output
from tests.support.models import Adapted, tiny_batch, tiny_model
from tests.training.test_lm_head import causal_lm


def moved(model, seed=5):
    """A copy whose weights are a little off."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def seq2seq(family: str):
    if family == "bart":
        sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
        config = BartConfig(vocab_size=60, d_model=16, dropout=0.0, init_std=0.3, **sizes)
        kind = BartForConditionalGeneration
    else:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2}
        config = T5Config(vocab_size=60, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
        kind = T5ForConditionalGeneration
    torch.manual_seed(0)
    return kind(config).eval()


def seq2seq_batch() -> dict:
    batch = tiny_batch(3, 7)
    batch["labels"] = torch.randint(3, 60, (3, 5), generator=torch.Generator().manual_seed(1))
    batch["labels"][1, 3:] = -100
    return batch


def kl_of(student, teacher, is_shown):
    rows = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    return rows[is_shown].mean()


def test_entries_reach_what_adapters_wrap():
    teacher = tiny_model(labels=3, type_vocab_size=2)
    with torch.no_grad():
        teacher.bert.embeddings.token_type_embeddings.weight.normal_()
    batch = tiny_batch(labels=3) | {"token_type_ids": torch.ones(3, 7, dtype=torch.long)}
    feature = FeatureAlignmentLoss(16, 16, 4, projection="none")
    student = Adapted(copy.deepcopy(teacher))
    distiller = Distiller(teacher, student, output=LogitKLLoss(), feature=feature, task_weight=0)
    assert distiller(**batch).loss.abs() < 1e-6
    alone = Distiller(None, Adapted(teacher))(**batch).logs["task"]
    torch.testing.assert_close(alone, teacher(**batch).loss)


def test_entries_reach_what_heads_build_upon():
    config = FalconConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    teacher = FalconForSequenceClassification(config).eval()
    batch = tiny_batch(padding="none") | {"position_ids": torch.arange(7).flip(0).expand(3, 7)}
    feature = FeatureAlignmentLoss(16, 16, 2, projection="none")
    distiller = Distiller(teacher.transformer, copy.deepcopy(teacher), feature=feature)
    assert distiller(**batch).loss.abs() < 1e-6


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_both_decoders_read_the_labels_of_the_batch(family):
    teacher = seq2seq(family)
    student, batch = moved(teacher), seq2seq_batch()
    ids = student.prepare_decoder_input_ids_from_labels(batch["labels"])
    full = batch | {"decoder_input_ids": ids, "output_hidden_states": True}
    with torch.no_grad():
        ours, theirs = student(**full), teacher(**full)
    is_shown = batch["labels"] != -100
    same = Distiller(teacher, copy.deepcopy(teacher), output=LogitKLLoss())(**batch)
    assert same.logs["soft"].abs() < 1e-6
    output = Distiller(teacher, student, output=LogitKLLoss())(**batch)
    torch.testing.assert_close(output.logs["soft"], kl_of(ours.logits, theirs.logits, is_shown))
    torch.testing.assert_close(output.logs["task"], ours.loss)

    # The middle layer: the last one is behind a norm in what transformers returns.
    prefix = "model." if family == "bart" else ""
    blocks = "layers" if family == "bart" else "block"
    for stack, mask in (("encoder", batch["attention_mask"].bool()), ("decoder", is_shown)):
        path = f"{prefix}{stack}.{blocks}"
        distiller = Distiller(
            *(teacher, student),
            mapping=[(1, 1)],
            feature=FeatureAlignmentLoss(16, 16, projection="none"),
            student_path=path,
            teacher_path=path,
        )
        states = [getattr(each, f"{stack}_hidden_states")[1][mask] for each in (ours, theirs)]
        want = (1 - F.cosine_similarity(*states, dim=-1)).mean()
        torch.testing.assert_close(distiller(**batch).logs["cosine"], want)


def test_parts_of_a_batch_of_two_sequences_add_up():
    teacher = seq2seq("bart")
    student, batch = moved(teacher), seq2seq_batch()
    path = "model.decoder.layers"
    distiller = Distiller(
        *(teacher, student),
        feature=FeatureAlignmentLoss(16, 16, 2),
        output=LogitKLLoss(),
        student_path=path,
        teacher_path=path,
    )
    whole = distiller(**batch).loss
    parts = [{name: value[rows] for name, value in batch.items()} for rows in ([0, 2], [1])]
    counts = [distiller.counts(**part) for part in parts]
    assert [count["decoder_tokens"].item() for count in counts] == [10, 3]
    total = {name: counts[0][name] + counts[1][name] for name in counts[0]}
    torch.testing.assert_close(
        sum(distiller(**part, normalizers=total).loss for part in parts), whole
    )


def test_decoder_inputs_of_models_that_have_no_method_for_them():
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "d_model": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    sizes |= {"max_source_positions": 8, "num_mel_bins": 4, "vocab_size": 60, "pad_token_id": 0}
    config = WhisperConfig(**sizes, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    teacher = WhisperForConditionalGeneration(config).eval()
    labels = torch.tensor([[5, 6, 9], [7, 8, -100]])
    batch = {"input_features": torch.randn(2, 4, 16), "labels": labels}
    own = teacher(**batch).loss
    distiller = Distiller(teacher, copy.deepcopy(teacher), output=LogitKLLoss())
    for more in ({}, {"decoder_input_ids": None}):
        logs = distiller(**batch, **more).logs
        assert logs["soft"].abs() < 1e-6
        torch.testing.assert_close(logs["task"], own)


def test_configs_need_blocks_for_layers_alone():
    teacher = seq2seq("bart")  # two lists of as many blocks
    config = DistillConfig(alpha=1.0, beta=0.0, delta=0.0)
    distiller = Distiller.from_config(teacher, moved(teacher), config)
    assert distiller(**seq2seq_batch()).logs["soft"] > 0


def test_labels_are_shifted_whatever_wraps_the_model():
    class Own(LlamaForCausalLM):
        pass

    model = causal_lm("llama")
    batch = tiny_batch(3, 9)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for student in (model, torch.compile(model), Adapted(model), Own(model.config)):
        assert is_causal_lm(student)
        assert Distiller(None, student).counts(**batch)["labels"] == 21
        assert isinstance(build_output(DistillConfig(alpha=1.0), student), LinearKLLoss)
    config = XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=32)
    assert not is_causal_lm(XLNetLMHeadModel(config))
    assert not is_causal_lm(seq2seq("t5"))
    # A decoder of these, whose labels stand at their own places too.
    sizes = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    decoder = BartForCausalLM(BartConfig(vocab_size=60, d_model=16, pad_token_id=0, **sizes))
    assert Distiller(None, decoder).counts(**batch)["labels"] == 24


def test_models_that_need_an_image_keep_their_heads():
    class SeeingForConditionalGeneration(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inside, self.config = model, model.config

        def get_output_embeddings(self):
            return self.inside.get_output_embeddings()

        def forward(self, pixel_values, input_ids=None, **kwargs):
            return self.inside(input_ids=input_ids, **kwargs)

    student = SeeingForConditionalGeneration(causal_lm("llama"))
    assert is_causal_lm(student)
    assert isinstance(build_output(DistillConfig(alpha=1.0), student), LogitKLLoss)
    with pytest.raises(ValueError, match="must run from input_ids alone"):
        check_lm_head(student)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_round_in_half_precision(dtype):
    for family, change in (("granite", {"logits_scaling": 6.0}), ("cohere", {"logit_scale": 0.83})):
        check_lm_head(causal_lm(family, hidden_size=256, vocab_size=2000, **change).to(dtype))


def test_caps_show_in_large_logits():
    model = causal_lm("llama")
    check_lm_head(model)
    model.lm_head.register_forward_hook(lambda _m, _args, out: 30 * torch.tanh(out / 30))
    with pytest.raises(ValueError, match="must compute its logits as a linear head does"):
        check_lm_head(model)
    model.config.logits_soft_cap = 30.0
    assert find_lm_head(model).softcap == 30.0
    check_lm_head(model)
    assert not model.lm_head._forward_pre_hooks


def test_what_two_models_would_share_is_refused():
    teacher, student = tiny_model(labels=3), tiny_model(labels=3, seed=1)
    with pytest.raises(ValueError, match="must not hold past_key_values: got one cache"):
        Distiller(teacher, student)(**tiny_batch(), past_key_values=object())
    teacher = tiny_model(labels=3)
    student.bert.encoder.layer[0] = teacher.bert.encoder.layer[0]
    with pytest.raises(ValueError, match=r"share what .* got 'bert.encoder.layer.0.attention"):
        Distiller(teacher, student)
    student.bert.encoder.layer[0].requires_grad_(False)
    Distiller(teacher, student)(**tiny_batch())


def test_outputs_that_cannot_be_read():
    teacher, student = tiny_model(), tiny_model(seed=1)
    distiller = Distiller(teacher, student, output=LogitKLLoss())
    with pytest.raises(ValueError, match=r"BertModel must return logits .* got last_hidden_state"):
        distiller(**tiny_batch())
    teacher.config.return_dict = False
    attention = AttentionKLLoss(4, weight=0.1)
    with pytest.raises(ValueError, match="return_dict of BertModel must be True: got a tuple"):
        Distiller(teacher, student, attention=attention)(**tiny_batch())
