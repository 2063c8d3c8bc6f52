"""A comparison as one self-contained HTML page: what it rests on, its tables, its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from r2m_ray.report.compare.tables import Table
from r2m_ray.report.html import Figure, document, figure_section, safe


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page.

    notes: paragraphs before everything else. warnings: what a reader must know before any number.
    """

    heading: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()


def page(title: str, *, kind: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The whole page as HTML. kind: the small line above the title. facts: rows of its last table."""
    header = f'<header><p class="kind">{safe(kind)}</p><h1>{safe(title)}</h1></header>'
    parts = [part for section in sections for part in _parts(section)]
    rows = "".join(f"<tr><th>{safe(name)}</th><td>{safe(value)}</td></tr>" for name, value in facts.items())
    made = f"<section><h2>Made with</h2><table>{rows}</table></section>" if facts else ""
    return document(title, [header, *parts, made])


def _parts(section: Section) -> list[str]:
    warnings = "".join(f'<p class="reading">{safe(text)}</p>' for text in section.warnings)
    notes = "".join(f"<p>{safe(text)}</p>" for text in section.notes)
    return [
        f"{warnings}<section><h2>{safe(section.heading)}</h2>{notes}</section>",
        *map(figure_section, section.figures),
        *map(_table, section.tables),
    ]


def _table(table: Table) -> str:
    head = "".join(f"<th>{safe(cell)}</th>" for cell in table.head)
    rows = "".join(f"<tr>{''.join(f'<td>{safe(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return (
        f"<section><h2>{safe(table.heading)}</h2><p>{safe(table.note)}</p>"
        f'<div class="wide"><table class="numbers"><tr>{head}</tr>{rows}</table></div></section>'
    )
