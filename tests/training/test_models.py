"""The classifier of the demo and its narrow copy."""

import pytest
import torch

from fakd.architectures import find_blocks
from fakd.models import TextClassifier, load_classifier, narrow_copy
from tests.support.models import tiny_batch, tiny_model


def make_teacher() -> TextClassifier:
    return TextClassifier(tiny_model(width=64, num_attention_heads=8), classes=3).eval()


def narrow(seed: int) -> TextClassifier:
    teacher = make_teacher()
    torch.manual_seed(seed)
    return narrow_copy(teacher, layers=2, width=24)


def test_mean_over_tokens_leaves_padding_out():
    model, batch = make_teacher(), tiny_batch()
    with torch.no_grad():
        logits = model(**batch).logits
        hidden = model.encoder(**batch).last_hidden_state
        for row, length in enumerate(batch["attention_mask"].sum(1)):
            expected = model.head(hidden[row, :length].mean(0))
            torch.testing.assert_close(logits[row], expected)


def test_loss_leaves_hidden_labels_out():
    model, batch = make_teacher(), tiny_batch(labels=3)
    first = {name: tensor[:1] for name, tensor in batch.items()}
    batch["labels"][1:] = -100
    torch.testing.assert_close(model(**batch).loss, model(**first).loss)


def test_blocks_are_found():
    assert find_blocks(make_teacher()).path == "encoder.encoder.layer"


def test_loads_from_a_folder(tmp_path):
    encoder = tiny_model(seed=3)
    encoder.save_pretrained(tmp_path)
    model = load_classifier(tmp_path, classes=5)
    assert model.head.out_features == 5
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor), name


def test_narrow_copy():
    first, again, other = narrow(0), narrow(0), narrow(1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert (first.config.num_hidden_layers, first.config.hidden_size) == (2, 24)
    assert first(**tiny_batch()).logits.shape == (3, 3)
    block = "encoder.encoder.layer.0.output.dense.weight"
    assert not torch.equal(first.state_dict()[block], other.state_dict()[block])


def test_embeddings_keep_the_geometry_of_the_teacher():
    teacher = make_teacher()
    whole = narrow_copy(teacher, layers=1, width=64)
    ours, theirs = (m.encoder.get_input_embeddings().weight.detach() for m in (whole, teacher))
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("width", [20, 72, 0])
def test_impossible_widths(width):
    with pytest.raises(ValueError, match=rf"multiple of 8, .* at most 64: got {width}"):
        narrow_copy(make_teacher(), layers=1, width=width)
