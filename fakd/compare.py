"""`fakd compare`: trainings that differ in some settings, from several seeds, and a verdict."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.console import Console

from .config import RunConfig, check_positive
from .config_file import ConfigError, Override, config_from, merge, read_settings, settings_from
from .distribute import is_main_process, start_anew
from .measure import Costs, measure_costs
from .page import to_table
from .report import Run, cost_rows, read_run, score_rows, verdict, write_page
from .run import START, TEACHER, RunResults, run
from .run_folder import STUDENT
from .train_log import in_words

REPORT = "report.html"


@dataclass(frozen=True)
class CompareConfig:
    """A comparison, whole: what `fakd compare` reads.

    `teacher`, `base` and each of `arms` hold settings of `RunConfig`, nested, without `output`.
    """

    # One sentence on what is compared.
    title: str
    # Settings that all students share.
    base: Mapping[str, Any]
    # Settings that change, by the name of each arm; every arm is judged against the first, and
    # against the one before it.
    arms: Mapping[str, Mapping[str, Any]]
    # Folder that receives the report, and a folder for each training.
    output: Path
    # A training that comes first, whose student is the teacher of all; None where `base` has one.
    teacher: Mapping[str, Any] | None = None
    # How often each arm is trained, each time from another start and in another order; > 0.
    seeds: int = 2
    # The arm whose loss of features is timed beside plain PyTorch; None times none.
    cost_of: str | None = None
    # Steps that are timed, > 0.
    timed_steps: int = 8

    def __post_init__(self) -> None:
        check_positive("seeds", self.seeds)
        check_positive("timed_steps", self.timed_steps)
        if not self.arms:
            raise ValueError("arms must name at least one way of training: got none; add one.")
        if self.cost_of is not None and self.cost_of not in self.arms:
            raise ValueError(
                f"cost_of must be one of the arms {', '.join(map(repr, self.arms))}: got "
                f"{self.cost_of!r}; choose one."
            )


@dataclass(frozen=True)
class Planned:
    """The trainings of a comparison."""

    teacher: RunConfig | None
    # By arm, one for each seed.
    arms: dict[str, list[RunConfig]]


def load_comparison(path: Path, overrides: Sequence[Override]) -> CompareConfig:
    """Read a comparison from a YAML file, then change some of it, as `load_config` does.

    Raises:
        ConfigError: as `load_config` does.
    """
    return settings_from(read_settings(path, overrides), CompareConfig)


def plan_trainings(config: CompareConfig) -> Planned:
    """The settings of every training, checked.

    Raises:
        ConfigError: settings that `fakd train` would refuse; the message says of which training.
    """
    teacher = None
    base = config.base
    if config.teacher is not None:
        teacher = _settings("teacher", config.teacher, config.output / "teacher")
        base = merge(base, {"teacher": str(teacher.output / STUDENT)})
    arms = {}
    for name, changed in config.arms.items():
        whole = merge(base, changed)
        first = _settings(name, whole, config.output).train.seed
        arms[name] = [
            _settings(
                name,
                merge(whole, {"train": {"seed": first + index}}),
                config.output / f"{_slug(name)}-{first + index}",
            )
            for index in range(config.seeds)
        ]
    folders = [each.output for runs in arms.values() for each in runs]
    if len(set(folders)) < len(folders):
        raise ConfigError(
            f"arms must have names of unequal letters and digits: got {', '.join(arms)}; rename "
            "some."
        )
    return Planned(teacher, arms)


def compare(config: CompareConfig, console: Console) -> dict[str, list[Run]]:
    """Train all, judge, and write the report; where it was interrupted, go on.

    Args:
        config: see `CompareConfig`.
        console: where progress, tables and the verdict go.

    Returns:
        The trainings by arm. `config.output` receives report.html, and each training's folder as
        `fakd train` writes it.

    Raises:
        As `plan_trainings` and `run` do.
    """
    planned = plan_trainings(config)
    console = console if is_main_process() else Console(quiet=True)
    console.print(config.title, soft_wrap=True, highlight=False)
    if planned.teacher is not None:
        results, _ = run(planned.teacher, console, title="teacher")
        _say("teacher", results, console)
        start_anew()
    known: dict[object, dict[str, float]] = {}
    for seed in range(config.seeds):
        for name, runs in planned.arms.items():
            keys = _baseline_keys(runs[seed])
            title = f"{name} ({runs[seed].train.seed})"
            scores = {role: known[key] for role, key in keys.items() if key in known}
            results, _ = run(runs[seed], console, title=title, known=scores)
            _say(title, results, console)
            if results is not None:
                known |= {keys[TEACHER]: results.teacher, keys[START]: results.start}
            # Every process must leave out the same work.
            (known,) = broadcast_object_list([known])
            start_anew()
    if results is None:
        return {}  # not the main process
    arms = {name: [read_run(each.output) for each in runs] for name, runs in planned.arms.items()}
    costs = None
    if config.cost_of is not None:
        console.print("measuring the cost of the fused loss of features and of the eager one")
        costs = measure_costs(planned.arms[config.cost_of][0], config.timed_steps)
    _show(config, planned, arms, costs, console)
    return arms


def _show(
    config: CompareConfig,
    planned: Planned,
    arms: dict[str, list[Run]],
    costs: Costs | None,
    console: Console,
) -> None:
    console.print(to_table("Held-out rows", *score_rows(arms)))
    if costs is not None:
        console.print(to_table("Cost", *cost_rows(costs)))
        console.print(costs.setting, style="dim", soft_wrap=True)
    console.print("\n" + "\n".join(verdict(arms)), style="bold", soft_wrap=True)
    write_page(arms, config.output / REPORT, config.title, costs, planned.teacher)
    console.print(f"Report: {config.output / REPORT}", soft_wrap=True, highlight=False)


def _say(title: str, results: RunResults | None, console: Console) -> None:
    if results is not None:
        console.print(f"{title}: {in_words(results.student)}", soft_wrap=True, highlight=False)


def _settings(name: str, settings: Mapping[str, Any], output: Path) -> RunConfig:
    if "output" in settings:
        raise ConfigError(
            f"{name}.output must be left out: got {settings['output']!r}; a comparison has one "
            "output for all."
        )
    try:
        return config_from({**settings, "output": str(output)})
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _baseline_keys(config: RunConfig) -> dict[str, object]:
    """What the scores of the teacher, and of the student before its training, depend on."""
    teacher = (config.task, config.data, config.teacher)
    return {TEACHER: teacher, START: (*teacher, config.student, config.train.seed)}


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
