"""Where each model family keeps its blocks: the one table of module paths.

A family that is not in the table is searched for the one list of modules as long as the number of
layers in its config, so most models work unlisted; otherwise pass the path.
"""

from dataclasses import dataclass

from torch import nn

# `config.model_type` -> path of the list of blocks, from `model.base_model`.
BLOCK_PATHS = {
    "albert": "encoder.albert_layer_groups",
    "bert": "encoder.layer",
    "bloom": "h",
    "camembert": "encoder.layer",
    "cohere": "layers",
    "deberta-v2": "encoder.layer",
    "distilbert": "transformer.layer",
    "electra": "encoder.layer",
    "falcon": "h",
    "gemma": "layers",
    "gemma2": "layers",
    "gemma3": "language_model.layers",
    "gemma3_text": "layers",
    "gpt2": "h",
    "gpt_neo": "h",
    "gpt_neox": "layers",
    "gptj": "h",
    "granite": "layers",
    "llama": "layers",
    "mistral": "layers",
    "mixtral": "layers",
    "modernbert": "layers",
    "mpnet": "encoder.layer",
    "olmo2": "layers",
    "opt": "decoder.layers",
    "phi": "layers",
    "phi3": "layers",
    "qwen2": "layers",
    "qwen2_moe": "layers",
    "qwen3": "layers",
    "qwen3_moe": "layers",
    "roberta": "encoder.layer",
    "smollm3": "layers",
    "stablelm": "layers",
    "starcoder2": "layers",
    "xlm-roberta": "encoder.layer",
}


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model in the order they run; a block that runs twice is listed twice."""

    owner: nn.Module  # whose forward runs the blocks
    modules: list[nn.Module]
    path: str  # of the list of blocks, from the model

    def __len__(self) -> int:
        return len(self.modules)


def inner_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside of data parallelism, compilation and adapters (peft)."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def find_blocks(model: nn.Module, path: str | None = None) -> Blocks:
    """Find the blocks of a Hugging Face encoder or decoder, with or without a head.

    Args:
        model: any module that contains the transformer; wrappers are looked through.
        path: where the list of blocks is, from `model`, such as "encoder.layer"; None looks it up
            by `config.model_type`, then searches.

    Returns:
        The blocks, one for each layer that runs, and the module that runs them.

    Raises:
        ValueError: no such path, or the search finds no list or several.
    """
    # Hides the attributes of the model.
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if path is not None:
        return _at(model, path)
    config = _text_config(model)
    known = BLOCK_PATHS.get(getattr(getattr(model, "config", None), "model_type", None))
    base = getattr(model, "base_model", model)
    if known is not None and (found := _get(base, known)) is not None:
        prefix = next((name for name, module in model.named_modules() if module is base), "")
        path = ".".join(filter(None, (prefix, known)))
        if isinstance(found, nn.ModuleList):
            return Blocks(_parent(base, known), _in_running_order(found, config), path)
    return _search(model, getattr(config, "num_hidden_layers", None))


def layer_count(model: nn.Module, path: str | None = None) -> int:
    """How many blocks run, so that the layers are 0 (embeddings) to this number."""
    return len(find_blocks(model, path))


def hidden_width(model: nn.Module) -> int:
    """Features of a hidden state, from the config."""
    width = getattr(_text_config(model), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"{type(model).__name__} must have config.hidden_size: got none; build "
            "FeatureAlignmentLoss(student_dims, teacher_dims) yourself and pass it."
        )
    return width


def _text_config(model: nn.Module) -> object:
    """The config that describes the blocks; multimodal models keep it one level down."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _at(model: nn.Module, path: str) -> Blocks:
    found = _get(model, path)
    if not isinstance(found, (nn.ModuleList, nn.Sequential)) or len(found) == 0:
        received = "no such module" if found is None else type(found).__name__
        raise ValueError(
            f"path must lead to the list of blocks of {type(model).__name__}: got {path!r}, "
            f"{received}; {_candidates(model)}"
        )
    return Blocks(_parent(model, path), _in_running_order(found, _text_config(model)), path)


def _search(model: nn.Module, count: int | None) -> Blocks:
    """The one ModuleList of `count` entries that is in no other such list."""
    matches = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # The parts of a block may be as many as the blocks, as T5's are two.
    matches = [m for m in matches if not any(m.startswith(f"{other}.") for other in matches)]
    if len(matches) != 1:
        expected = "config.num_hidden_layers" if count is None else f"{count} blocks"
        received = ", ".join(map(repr, matches)) or "none"
        raise ValueError(
            f"{type(model).__name__} must have exactly one module list of {expected}: "
            f"got {received}; pass its path, such as 'encoder.layer'. {_candidates(model)}"
        )
    return _at(model, matches[0])


def _candidates(model: nn.Module) -> str:
    lists = [
        f"{name!r} ({len(module)})"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    return f"it has the module lists {', '.join(lists[:8]) or '(none)'}."


def _in_running_order(modules: nn.ModuleList, config: object) -> list[nn.Module]:
    """One entry per layer that runs: ALBERT runs each of its few groups several times."""
    count = getattr(config, "num_hidden_layers", len(modules))
    if getattr(config, "model_type", None) != "albert":
        return list(modules)
    return [modules[layer * len(modules) // count] for layer in range(count)]


def _get(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])
