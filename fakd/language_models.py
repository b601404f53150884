"""Causal language models: one from a GGUF file, a copy with fewer blocks, and perplexity."""

import copy
import importlib.util
import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .architectures import find_blocks
from .lm_head import is_causal_lm


def cache_folder() -> Path:
    """Where converted models are kept: `fakd` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fakd"


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


def kept_blocks(blocks: int, count: int) -> list[int]:
    """Indices of `count` of the blocks at even distances, the first and the last among them."""
    if not 2 <= count <= blocks:
        raise ValueError(
            f"layers must be from 2 to {blocks}, the teacher's: got {count}; change it."
        )
    return [round(index * (blocks - 1) / (count - 1)) for index in range(count)]


@torch.no_grad()
def shallow_copy(teacher: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """A causal language model of some of the teacher's blocks, and of all else that it has.

    Args:
        teacher: a causal language model of Hugging Face; not changed.
        kept: indices of its blocks, ascending.

    Returns:
        A model with weights of its own, in eval mode.

    Raises:
        ValueError: a model without a language model's head, or blocks that do not fit.
    """
    if not is_causal_lm(teacher):
        raise ValueError(
            f"teacher must be a causal language model: got {type(teacher).__name__}; load it with "
            "AutoModelForCausalLM."
        )
    blocks = find_blocks(teacher)
    settings = copy.deepcopy(teacher.config)
    text = settings.get_text_config()
    text.num_hidden_layers = len(kept)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[index] for index in kept]
    student = type(teacher)(settings)
    prefix = f"{blocks.path}."
    rest = {k: v for k, v in teacher.state_dict().items() if not k.startswith(prefix)}
    unknown = student.load_state_dict(rest, strict=False).unexpected_keys
    if unknown:
        raise ValueError(
            f"{type(teacher).__name__} must have the same modules around its blocks at any depth: "
            f"got {', '.join(unknown[:3])} besides; copy the blocks yourself."
        )
    for block, index in zip(find_blocks(student).modules, kept, strict=True):
        block.load_state_dict(blocks.modules[index].state_dict())
    return student.to(next(teacher.parameters()).dtype).eval()


@torch.no_grad()
def block_losses(model: nn.Module, blocks: Tensor, rows: int = 4) -> Tensor:
    """Mean cross-entropy of the next tokens of each block, in eval mode.

    Args:
        model: a causal language model of Hugging Face.
        blocks: [N, T] token ids without padding; nothing is carried from one to the next.
        rows: blocks at a time, so that logits exist for `rows * T` tokens and no more.

    Returns:
        [N] float32, on the CPU; each is a mean over T - 1 tokens.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    losses = []
    for part in blocks.split(rows):
        part = part.to(device)
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        each = F.cross_entropy(logits.float().transpose(1, 2), part[:, 1:], reduction="none")
        losses.append(each.mean(dim=1).cpu())
    model.train(was_training)
    return torch.cat(losses)


def perplexity(model: nn.Module, blocks: Tensor, rows: int = 4) -> float:
    """exp(mean cross-entropy) of the next tokens of blocks; see `block_losses`."""
    return block_losses(model, blocks, rows).mean().exp().item()
