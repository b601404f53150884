"""The log of a training: means of its terms, written and shown as they come."""

import json
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from .files import write_whole

LogLine = dict[str, float]
SCORES = "scores.jsonl"  # beside the log: of checkpoints, on the held-out rows


class TrainLog:
    """Lines of means over some steps; the main process writes them and draws a progress bar.

    Args:
        accelerator: what it tracks receives the lines too.
        every: steps between two lines.
        steps: of the whole training; there is a line after the last.
        done: steps that were taken before: lines up to there are kept, later ones are dropped.
        path: of the file, one JSON object per line; None writes none.
        console: where to draw the bar; None draws none.
        title: what the bar says.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        every: int,
        steps: int,
        done: int,
        path: Path | None,
        console: Console | None,
        title: str,
    ) -> None:
        self.lines: list[LogLine] = []
        self._accelerator = accelerator
        self._every, self._steps, self._done = every, steps, done
        self._path = path if accelerator.is_main_process else None
        self._is_drawn = console is not None and accelerator.is_main_process
        self._bar = _progress_bar(console, self._is_drawn)
        self._task = self._bar.add_task(title, total=steps, completed=done)
        self._open = ExitStack()
        self._file = None
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def __enter__(self) -> "TrainLog":
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.lines = _lines_until(self._done, self._path)
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_whole(self._path, text)
            self._file = self._open.enter_context(self._path.open("a", encoding="utf-8"))
        self._open.enter_context(self._bar)
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self._open.close()

    def add(self, step: int, means: dict[str, Tensor], learning_rate: float) -> None:
        """Add the values of one step, [] each, and write a line when one is due."""
        for name, value in means.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._count += 1
        if step % self._every == 0 or step == self._steps:
            self._write(step, learning_rate)
        self._bar.update(self._task, completed=step)

    def add_scores(self, step: int, scores: dict[str, float]) -> None:
        """Write, and say, what a checkpoint scored on the held-out rows."""
        if not scores:
            return
        if self._path is not None:
            path = self._path.with_name(SCORES)
            lines = [*_lines_until(step - 1, path), {"step": step, **scores}]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._accelerator.log({f"held_out/{k}": v for k, v in scores.items()}, step=step)
        if self._is_drawn and step < self._steps:
            self._bar.console.print(f"step {step}: {in_words(scores)}", highlight=False)

    def _write(self, step: int, learning_rate: float) -> None:
        # The one place where the terms reach the host.
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        now = time.perf_counter()
        seconds = (now - self._began) / self._count
        line = {"step": step, **means, "learning_rate": learning_rate, "step_seconds": seconds}
        self.lines.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
        self._bar.terms = _terms_in_words(line)
        self._sums, self._count, self._began = {}, 0, now


def in_words(scores: dict[str, float]) -> str:
    """accuracy 0.912, macro_f1 0.874"""
    return ", ".join(
        f"{name} {value:.2f}" if name.endswith("perplexity") else f"{name} {value:.4f}"
        for name, value in scores.items()
    )


def _terms_in_words(line: LogLine) -> str:
    """loss 1.234 = task 0.610 + soft 0.624"""
    prefix = "weighted_"
    parts = [f"{k.removeprefix(prefix)} {v:.3f}" for k, v in line.items() if k.startswith(prefix)]
    return f"loss {line['loss']:.3f}" + (f" = {' + '.join(parts)}" if len(parts) > 1 else "")


def _lines_until(step: int, path: Path) -> list[LogLine]:
    """The lines of a file up to a step; one that was cut off while it was written ends them."""
    lines: list[LogLine] = []
    if step == 0 or not path.is_file():
        return lines
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if line["step"] <= step:
            lines.append(line)
    return lines


class _Bar(Progress):
    """A bar, and beneath it the terms of the loss."""

    terms = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.terms:
            yield Text(self.terms, style="dim")


def _progress_bar(console: Console | None, is_drawn: bool) -> _Bar:
    return _Bar(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not is_drawn,
    )
