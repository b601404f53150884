"""Pages of HTML that need no other file: tables, drawings as SVG, and the frame around them."""

import html
import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; color: #57606a }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #d0d7de }
th:first-child, td:first-child { text-align: left } svg { max-width: 100%; height: auto }
.verdict { border-left: 4px solid #1f6feb; padding: .4rem 1rem; background: #f6f8fa }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A page of parts that are HTML themselves, beneath its title."""
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>\n"
        + "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
        + "\n</html>\n"
    )


def to_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table for the terminal."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def html_table(caption: str, columns: list[str], rows: list[list[str]]) -> str:
    """A table with everything escaped; the first column to the left."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{body}</table>"


def svg(figure: Figure) -> str:
    """A drawing as an element of a page; closes the figure."""
    text = io.StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
