"""Students cut from their teacher: some of its blocks, optionally narrower."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .architectures import Blocks, find_blocks, hidden_width

# What configs call the features inside a block's MLP, and those that are as wide as its output.
_INNER = ("intermediate_size", "moe_intermediate_size", "hidden_dim", "n_inner", "ffn_dim")
_AS_WIDE = ("word_embed_proj_dim", "pooler_hidden_size", "embedding_size")


def kept_blocks(blocks: int, layers: int | Sequence[int]) -> list[int]:
    """Indices of the blocks that a student keeps.

    Args:
        blocks: of the teacher.
        layers: how many, at even distances with the first and the last among them, of one the last;
            or which, ascending, counted from 1.

    Raises:
        ValueError: blocks that the teacher does not have.
    """
    if isinstance(layers, int):
        if not 1 <= layers <= blocks:
            raise ValueError(
                f"layers must be from 1 to {blocks}, the teacher's: got {layers}; change it."
            )
        if layers == 1:
            return [blocks - 1]
        return [round(index * (blocks - 1) / (layers - 1)) for index in range(layers)]
    listed = list(layers)
    if not listed or listed != sorted(set(listed)) or not 1 <= listed[0] <= listed[-1] <= blocks:
        raise ValueError(
            f"layers must be ascending numbers from 1 to {blocks}, the teacher's: got {listed}; "
            "change them."
        )
    return [layer - 1 for layer in listed]


@torch.no_grad()
def cut(teacher: PreTrainedModel, kept: Sequence[int], width: int | None = None) -> PreTrainedModel:
    """A model of the teacher's class with some of its blocks.

    Of the teacher's width, it has those blocks' weights and all that stands around the blocks. A
    narrower one has fewer heads of the same width each; its embeddings, and an untied head of a
    language model, start as the teacher's, seen along the main axes (PCA) of its word embeddings;
    everything else is drawn at random.

    Args:
        teacher: an encoder or a causal language model of Hugging Face, with or without a head; not
            changed.
        kept: indices of its blocks, ascending.
        width: features of the hidden states; None keeps the teacher's.

    Returns:
        A model with weights of its own, in eval mode.

    Raises:
        ValueError: a width that does not fit the heads, or blocks that do not fit elsewhere.
    """
    blocks = find_blocks(teacher)
    if len({id(block) for block in blocks.modules}) != len(blocks):
        raise ValueError(
            f"teacher must have blocks of its own for each layer: got {type(teacher).__name__}, "
            "which runs some twice; pass student.config."
        )
    settings = _cut_config(teacher, kept)
    if width is not None and width != hidden_width(teacher):
        _narrow_config(settings.get_text_config(), width)
    student = type(teacher)(settings)
    if hidden_width(student) == hidden_width(teacher):
        _copy_weights(teacher, blocks, student, kept)
    else:
        _project_embeddings(teacher, student)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(next(teacher.parameters()).dtype).eval()


def _cut_config(teacher: PreTrainedModel, kept: Sequence[int]) -> PreTrainedConfig:
    settings = copy.deepcopy(teacher.config)
    text = settings.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = len(kept)
    if kinds:
        text.layer_types = [kinds[index] for index in kept]
    return settings


def _narrow_config(text: PreTrainedConfig, width: int) -> None:
    """Change sizes to those of a narrower model, in place."""
    full, heads = text.hidden_size, text.num_attention_heads
    unit = full // heads
    if width % unit or not 0 < width <= full:
        raise ValueError(
            f"student.width must be a multiple of {unit}, the teacher's width per head, and at "
            f"most {full}: got {width}; change it."
        )
    # By their own names: an alias would scale the same number twice.
    inner = {text.attribute_map.get(name, name) for name in _INNER}
    for name in inner:
        if isinstance(size := getattr(text, name, None), int):
            setattr(text, name, size * width // full)
    for name in _AS_WIDE:
        if getattr(text, name, None) == full:
            setattr(text, name, width)
    text.hidden_size, text.num_attention_heads = width, width // unit
    groups = getattr(text, "num_key_value_heads", None)
    if groups is not None and "num_key_value_heads" not in text.attribute_map:
        most = max(1, groups * text.num_attention_heads // heads)
        divisors = [n for n in range(1, most + 1) if text.num_attention_heads % n == 0]
        text.num_key_value_heads = divisors[-1]


def _copy_weights(
    teacher: PreTrainedModel, blocks: Blocks, student: PreTrainedModel, kept: Sequence[int]
) -> None:
    prefix = f"{blocks.path}."
    rest = {k: v for k, v in teacher.state_dict().items() if not k.startswith(prefix)}
    unknown = student.load_state_dict(rest, strict=False).unexpected_keys
    if unknown:
        raise ValueError(
            f"{type(teacher).__name__} must have the same modules around its blocks at any depth: "
            f"got {', '.join(unknown[:3])} besides; copy the blocks yourself."
        )
    for place, (block, index) in enumerate(
        zip(find_blocks(student).modules, kept, strict=True), start=1
    ):
        try:
            block.load_state_dict(blocks.modules[index].state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"block {index + 1} of {type(teacher).__name__} must fit in the place of block "
                f"{place}: got other weights; keep blocks of one kind, the first among them."
            ) from error


def _project_embeddings(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    full, width = hidden_width(teacher), hidden_width(student)
    words = teacher.get_input_embeddings().weight.float()
    if words.shape[1] != full:
        raise ValueError(
            f"teacher must have word embeddings as wide as its hidden states to be narrowed: got "
            f"{words.shape[1]} and {full}; leave student.width out, or pass student.config."
        )
    axes = torch.linalg.eigh(torch.cov(words.T)).eigenvectors.flip(1)[:, :width]

    def project(ours: Tensor, theirs: Tensor) -> None:
        ours.copy_(theirs.float() @ axes)

    for name, module in teacher.named_modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == full:
            project(student.get_submodule(name).weight, module.weight)
    head, embeddings = student.get_output_embeddings(), student.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        project(head.weight, teacher.get_output_embeddings().weight)
