"""The table of module paths, the search behind it, and its errors."""

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5EncoderModel

from fakd.architectures import find_blocks, hidden_width, layer_count
from tests.support.models import FAMILIES, tiny_model


class Custom(nn.Module):
    """A model that no table knows."""

    def __init__(self, lengths=(3,), count=3):
        super().__init__()
        self.config = type("Config", (), {"num_hidden_layers": count})()
        for index, length in enumerate(lengths):
            self.add_module(f"list{index}", nn.ModuleList(nn.Linear(4, 4) for _ in range(length)))
        self.body = nn.Linear(4, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = tiny_model(family, layers=4, width=16)
    blocks = find_blocks(model)
    assert len(blocks) == layer_count(model) == 4
    assert hidden_width(model) == 16
    assert isinstance(model.get_submodule(blocks.path), nn.ModuleList)


def test_heads_and_wrappers_are_looked_through():
    classifier = tiny_model("bert", labels=3)
    assert find_blocks(classifier).path == "bert.encoder.layer"
    wrapped = nn.Sequential(classifier)
    wrapped.config = classifier.config
    assert find_blocks(wrapped).modules == find_blocks(classifier).modules


def test_causal_language_model():
    config = AutoConfig.for_model(
        "qwen3", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=20
    )
    assert find_blocks(AutoModelForCausalLM.from_config(config)).path == "model.layers"


def test_albert_lists_a_block_as_often_as_it_runs():
    first, second, third, fourth = find_blocks(tiny_model("albert", layers=4)).modules
    assert first is second
    assert third is fourth
    assert second is not third


def test_search_finds_the_one_list_of_that_length():
    assert find_blocks(Custom((5, 3))).path == "list1"


@pytest.mark.parametrize("blocks", [2, 3])
def test_lists_inside_of_blocks_are_no_rivals(blocks):
    config = T5Config(num_layers=blocks, d_model=8, d_kv=4, d_ff=8, num_heads=2, vocab_size=9)
    found = find_blocks(T5EncoderModel(config))
    assert (found.path, len(found)) == ("encoder.block", blocks)


def test_path_is_taken_as_given():
    assert len(find_blocks(Custom((5, 3)), "list0")) == 5


@pytest.mark.parametrize(
    ("model", "path", "match"),
    [
        (Custom((5,)), None, "exactly one module list of 3 blocks: got none; pass its path"),
        (Custom((3, 3)), None, "got 'list0', 'list1'; pass its path"),
        (Custom((3,), None), None, "of config.num_hidden_layers: got none"),
        (Custom(), "encoder", r"got 'encoder', no such module; .*'list0' \(3\)"),
        (Custom(), "body", "got 'body', Linear"),
    ],
)
def test_errors(model, path, match):
    with pytest.raises(ValueError, match=match):
        find_blocks(model, path)


def test_width_must_be_known():
    with pytest.raises(ValueError, match=r"Custom must have config\.hidden_size"):
        hidden_width(Custom())
