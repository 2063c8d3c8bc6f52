"""A study as Markdown to read and JSON to compute with; both show every seed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r2m_ray.report.compare.statistics import LEVEL, limits
from r2m_ray.report.compare.study import SHARED_NAME, Contrast, Study, Values
from r2m_ray.report.html import Table, markdown_text
from r2m_ray.run.files import replace_file

MARKDOWN_FILE = "comparison.md"
JSON_FILE = "comparison.json"
CENSORED = "censored"


def write_tables(study: Study, directory: Path) -> tuple[Path, Path]:
    """Write ``comparison.md`` and ``comparison.json`` into a directory and return their paths."""
    paths = directory / MARKDOWN_FILE, directory / JSON_FILE
    replace_file(paths[0], markdown(study))
    replace_file(paths[1], json.dumps(record(study), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return paths


def markdown(study: Study) -> str:
    """What the numbers depend on, then one table per endpoint."""
    parts = [markdown_text(sentence) for sentence in preface(study)]
    for table in tables(study):
        parts += [f"## {table.heading}", table.note, table.markdown()]
    return "\n\n".join(parts) + "\n"


def preface(study: Study) -> list[str]:
    """Where arms are matched, what so many seeds can show, and how to read the cells."""
    top, baseline = study.peak, study.baseline
    if top is None and study.gold:
        matched = (
            f"There is no KL*: the mean gold of {baseline} is highest before any training, so arms are not "
            "matched in KL, and differences below mix how far an arm went with how well."
        )
    elif top is None:
        matched = (
            "There is no gold score here. The frozen reward model's score is the proxy that training "
            "exploits: a higher one at the same KL does not prove a better policy."
        )
    else:
        ended = " The runs end at this peak: KL* is a lower bound." if top.share == 1 else ""
        matched = (
            f"KL* = {top.kl:.4g} nats per response: there the mean curve of {top.arm} is highest "
            f"in gold ({top.gold:.3f}, after step {top.step}, {top.share:.0%} of the run).{ended}"
        )
    held = " with KL* fixed" if top else ""
    return [
        matched,
        limits(len(study.seeds), len(study.challengers)),
        f"Differences are to {baseline} under the same seed, their intervals percentile bootstraps over "
        f"seeds{held}, p exact sign-flip tests, by Holm adjusted over the arms of an endpoint. "
        f"“{CENSORED}”: that run never got there; nothing is extrapolated, means and intervals are then of "
        "the remaining seeds, and there is no test.",
    ]


def tables(study: Study) -> list[Table]:
    """One table per endpoint: each seed, their mean, and the difference to the baseline with its interval."""
    found = [
        Table(
            heading=endpoint.label,
            note=f"{'Primary' if endpoint.primary else 'Secondary'} endpoint.",
            head=("arm", *(f"seed {seed}" for seed in study.seeds), "mean", *_CONTRAST_HEAD),
            rows=tuple(
                (arm, *map(number, values), mean(values), *_contrast_cells(contrasts.get(arm)))
                for arm, values in study.values[endpoint.name].items()
            ),
        )
        for endpoint, contrasts in ((each, study.contrasts[each.name]) for each in study.endpoints)
    ]
    if SHARED_NAME in study.contrasts:
        found.append(_shared_table(study))
    return found


def record(study: Study) -> dict[str, Any]:
    """The study as JSON-ready values; a censored number is ``null``."""
    return {
        "baseline": study.baseline,
        "seeds": list(study.seeds),
        "level": LEVEL,
        "limits": limits(len(study.seeds), len(study.challengers)),
        "kl_star": None if study.peak is None else asdict(study.peak),
        "endpoints": {e.name: {"label": e.label, "primary": e.primary, "kl": e.kl} for e in study.endpoints},
        "values": study.values,
        "contrasts": {
            name: {arm: asdict(contrast) for arm, contrast in arms.items()}
            for name, arms in study.contrasts.items()
        },
    }


def _shared_table(study: Study) -> Table:
    return Table(
        heading="Mean gold over the KL that both reach",
        note="Secondary endpoint, from 0 to the largest KL that arm and baseline both reach under every "
        "seed, at most 4 KL*: a range per arm, so rows are not comparable.",
        head=("arm", "nats", *(f"difference, seed {seed}" for seed in study.seeds), *_CONTRAST_HEAD),
        rows=tuple(
            (arm, number(c.kl), *map(number, c.differences), *_contrast_cells(c))
            for arm, c in study.contrasts[SHARED_NAME].items()
        ),
    )


_CONTRAST_HEAD = ("difference", f"{LEVEL:.0%} interval", "p", "p (Holm)")


def _contrast_cells(contrast: Contrast | None) -> list[str]:
    """Mean difference, interval, p and adjusted p; dashes for the baseline itself."""
    if contrast is None:
        return ["–"] * len(_CONTRAST_HEAD)
    interval = contrast.interval
    return [
        mean(contrast.differences, "+.3f"),
        "–" if interval is None else f"[{interval.low:+.3f}, {interval.high:+.3f}]",
        "–" if contrast.p is None else f"{contrast.p:.3g}",
        "–" if contrast.p_holm is None else f"{contrast.p_holm:.3g}",
    ]


def mean(values: Values, digits: str = ".3f") -> str:
    """The mean of the seeds that are not censored, and how many those are where they are not all."""
    known = [value for value in values if value is not None]
    if not known:
        return CENSORED
    part = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{sum(known) / len(known):{digits}}{part}"


def number(value: float | None) -> str:
    """Three decimals, or the word for a censored number."""
    return CENSORED if value is None else f"{value:.3f}"
