"""A causal language model on real text: does a shallow student learn more with its teacher?

The student is some of the teacher's blocks, which alone can do little. It learns twice from that
start, on the same batches: from the next tokens alone, and from the teacher's predictions, hidden
states and attention too.
"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from . import data
from .architectures import layer_count
from .config import DistillConfig, TrainConfig, check_positive
from .cutting import cut, kept_blocks
from .data import load_corpus, spread, to_blocks
from .demo_shared import environment, model_folder, quieten_libraries, write_record
from .distiller import Distiller
from .language_models import block_losses, smollm2_folder
from .page import to_table
from .train import train

TEACHER = "teacher"
START = "student, untrained"
LABELS_ONLY = "student, labels only"
DISTILLED = "student, distilled"


@dataclass(frozen=True)
class LMDemoConfig:
    """The demo of language models: one teacher, and the same shallow student trained twice."""

    # Folder of a Hugging Face causal LM; None takes SmolLM2-135M-Instruct from its package.
    teacher: Path | None = None
    # Folder of texts, see `fakd.data.load_corpus`; None takes speeches and plays from packages.
    texts: Path | None = None
    # Folder that receives the results and the logs.
    output: Path = Path("outputs/demo-lm")
    # Blocks of the student, > 1.
    layers: int = 8
    # Steps of each training, > 0.
    steps: int = 120
    # Blocks of text in each step, > 0, and tokens in each of them, > 1.
    rows: int = 4
    tokens: int = 128
    # Blocks of each held-out set, > 0.
    held_out_blocks: int = 64
    # Peak learning rate of AdamW, per step: better than 5e-4 for labels only over 60 steps of
    # batches that were not seen before, and for distillation over 24 on speeches held out for that.
    learning_rate: float = 1e-3
    # Seed of the order of the batches.
    seed: int = 0
    # What the student learns from the teacher; the mapping is that of the blocks it has from it.
    # Distances, not their squares: a few states of the teacher are a thousand times the others.
    distill: DistillConfig = field(
        default_factory=lambda: DistillConfig(
            alpha=1.0, beta=1.0, gamma=0.1, delta=0.003, euclidean="distance"
        )
    )

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "held_out_blocks", "learning_rate"):
            check_positive(name, getattr(self, name))


@dataclass(frozen=True)
class Scored:
    """One model on the held-out sets."""

    name: str
    parameters: int
    losses: dict[str, list[float]]  # by set: mean cross-entropy of each block
    step_seconds: float | None = None  # mean over its training
    log: list[dict[str, float]] = field(default_factory=list)

    def perplexity(self, name: str) -> float:
        return torch.tensor(self.losses[name]).mean().exp().item()


@dataclass(frozen=True)
class LMResults:
    """Everything that is printed."""

    setting: str
    models: list[Scored]
    pairs: list[tuple[int, int]]
    tokens: dict[str, int]  # by set: tokens that were predicted
    environment: str

    def model(self, name: str) -> Scored:
        return next(model for model in self.models if model.name == name)


def run_demo_lm(config: LMDemoConfig, console: Console) -> LMResults:
    """Train, score and write the results; says on `console` what it does.

    Args:
        config: see `LMDemoConfig`.
        console: where progress, the table and the verdict go.

    Returns:
        What is printed. `config.output` receives results.json and the logs of both trainings.

    Raises:
        ModuleNotFoundError, OSError, ValueError: models, texts or folders that are not there or do
            not fit, before any training.
    """
    began = time.perf_counter()
    config.output.mkdir(parents=True, exist_ok=True)
    quieten_libraries()
    corpus = load_corpus(config.texts)
    folder = _teacher_folder(config, console)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept = kept_blocks(layer_count(teacher), config.layers)
    start = cut(teacher, kept)
    console.print(f"cutting {corpus.name} into blocks of {config.tokens} tokens")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks = to_blocks(corpus.train, tokenizer, config.tokens, "train")
    held_out = {
        name: spread(to_blocks(texts, tokenizer, config.tokens, name), config.held_out_blocks)
        for name, texts in corpus.held_out.items()
    }
    # Each of the student's layers learns from the one that its block came from.
    pairs = [(ours + 1, theirs + 1) for ours, theirs in enumerate(kept)]
    setting = _describe(config, corpus.name, blocks, kept, layer_count(teacher))
    console.print(setting, soft_wrap=True)

    models = [_score(TEACHER, teacher, held_out), _score(START, start, held_out)]
    arms = {
        LABELS_ONLY: dataclasses.replace(
            config.distill, task_weight=1.0, alpha=0.0, beta=0.0, gamma=0.0, delta=0.0
        ),
        DISTILLED: dataclasses.replace(config.distill, mapping=pairs),
    }
    for name, settings in arms.items():
        distiller = Distiller.from_config(teacher, copy.deepcopy(start), settings)
        log = train(
            distiller,
            _batches(blocks, config),
            TrainConfig(learning_rate=config.learning_rate, seed=config.seed),
            log_path=config.output / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl",
            console=console,
            title=name,
        )
        models.append(_score(name, distiller.student, held_out, log))
    counted = {name: part[:, 1:].numel() for name, part in held_out.items()}
    results = LMResults(setting, models, pairs, counted, environment())
    _write(results, config)
    console.print(to_table("Held-out perplexity", *score_rows(results)))
    console.print(_describe_scores(config, results), style="dim", soft_wrap=True)
    console.print(f"\n{verdict(results)}", style="bold", soft_wrap=True)
    minutes = (time.perf_counter() - began) / 60
    console.print(
        f"Results: {config.output / 'results.json'} ({minutes:.1f} minutes)", soft_wrap=True
    )
    return results


def score_rows(results: LMResults) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the table."""
    columns = ["model", *results.tokens, "weights", "s per step"]
    rows = []
    for model in results.models:
        scores = [f"{model.perplexity(name):.1f}" for name in results.tokens]
        seconds = "" if model.step_seconds is None else f"{model.step_seconds:.2f}"
        rows.append([model.name, *scores, f"{model.parameters / 1e6:.1f} M", seconds])
    return columns, rows


def verdict(results: LMResults) -> str:
    """Say from the numbers, a line for each held-out set, whether the teacher helped.

    The difference is of the mean cross-entropy of each block, labels only minus distilled; noise is
    twice the standard error of its mean over the blocks.
    """
    plain, distilled = results.model(LABELS_ONLY), results.model(DISTILLED)
    lines = []
    for name in results.tokens:
        gain, noise = paired_gain(plain.losses[name], distilled.losses[name])
        if gain > noise:
            judged = "helped beyond noise"
        elif -gain > noise:
            judged = "hurt beyond noise"
        else:
            judged = "made no clear difference: the change is within noise"
        lines.append(
            f"{name}: distillation {judged}. Perplexity {plain.perplexity(name):.1f} to "
            f"{distilled.perplexity(name):.1f}; cross-entropy lower by {gain:.3f} ± {noise:.3f} "
            f"(twice the standard error over {len(plain.losses[name])} blocks; one seed)."
        )
    return "\n".join(lines)


def paired_gain(plain: list[float], distilled: list[float]) -> tuple[float, float]:
    """Mean of what each block gains, and twice its standard error."""
    gains = [p - d for p, d in zip(plain, distilled, strict=True)]
    if len(gains) < 2:
        return gains[0], float("inf")
    return statistics.mean(gains), 2 * statistics.stdev(gains) / len(gains) ** 0.5


def _teacher_folder(config: LMDemoConfig, console: Console) -> Path:
    if config.teacher is None:
        console.print("reading SmolLM2-135M-Instruct, de-quantised on first use")
        return smollm2_folder()
    return model_folder(config.teacher)


def _batches(blocks: Tensor, config: LMDemoConfig) -> DataLoader:
    """The same for every training."""
    everything = list(range(len(blocks)))
    plan = data.mixed_batches(everything, everything, (config.rows, 0), config.steps, config.seed)
    return DataLoader(blocks, batch_sampler=plan, collate_fn=_collate)


def _collate(rows: list[Tensor]) -> Mapping[str, Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _score(
    name: str,
    model: PreTrainedModel,
    held_out: dict[str, Tensor],
    log: list[dict[str, float]] | None = None,
) -> Scored:
    losses = {key: block_losses(model, blocks).tolist() for key, blocks in held_out.items()}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = statistics.mean(line["step_seconds"] for line in log) if log else None
    return Scored(name, parameters, losses, seconds, log or [])


def _describe(config: LMDemoConfig, name: str, blocks: Tensor, kept: list[int], layers: int) -> str:
    if config.teacher is None:
        teacher = (
            "SmolLM2-135M-Instruct, an instruction-tuned model whose 4-bit weight file (Q4_1) is "
            "de-quantised to float32, so neither the base model nor its full precision"
        )
    else:
        teacher = f"the model in {config.teacher.name}"
    listed = ", ".join(str(index + 1) for index in kept)
    return (
        f"{name}: the teacher is {teacher}; the student is its blocks {listed} of {layers} with "
        "its embeddings, norm and head. Both trainings start there and take the same "
        f"{config.steps} steps of {config.rows} x {config.tokens} tokens out of "
        f"{blocks.numel()} (seed {config.seed})."
    )


def _describe_scores(config: LMDemoConfig, results: LMResults) -> str:
    counted = " and ".join(f"{count} ({name})" for name, count in results.tokens.items())
    caution = (
        " The teacher may have read these texts when it was trained."
        if config.teacher is None
        else ""
    )
    return (
        f"Perplexity per token over {counted} tokens, in blocks of {config.tokens} spread evenly "
        "over the texts; no context is carried from one block to the next, and the first token of "
        f"each is not predicted.{caution} Weights count a tied head once. Float32, "
        f"{torch.get_num_threads()} threads."
    )


def _write(results: LMResults, config: LMDemoConfig) -> None:
    columns, rows = score_rows(results)
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    write_record(config.output, config, results, verdict=verdict(results), table=table)
