"""A study as Markdown to read and JSON to compute with; both show every seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r2m_ray.analysis.bootstrap import LEVEL, limits
from r2m_ray.analysis.study import SHARED_NAME, Contrast, Study, Values
from r2m_ray.errors import RunError
from r2m_ray.escape import printable
from r2m_ray.run_files import replace_file

MARKDOWN_FILE = "comparison.md"
JSON_FILE = "comparison.json"
CENSORED = "censored"


def write_tables(study: Study, directory: Path) -> tuple[Path, Path]:
    """Write ``comparison.md`` and ``comparison.json`` into a directory and return their paths.

    Raises RunError naming what cannot be written.
    """
    paths = directory / MARKDOWN_FILE, directory / JSON_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{directory}: cannot make this directory: {error.strerror}. Choose another."
        ) from error
    replace_file(paths[0], markdown(study))
    replace_file(paths[1], json.dumps(record(study), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return paths


def markdown(study: Study) -> str:
    """One table per endpoint: each seed, their mean, and the difference to the baseline with its interval."""
    top, baseline = study.peak, _cell(study.baseline)
    arms = len(study.contrasts["area"])
    ended = " The runs end at this peak: KL* is a lower bound." if top.share == 1 else ""
    parts = [
        f"KL* = {top.kl:.4g} nats per response: there the mean curve of {baseline} is highest in gold "
        f"({top.gold:.3f}, after step {top.step}, {top.share:.0%} of the run).{ended}",
        limits(len(study.seeds), arms),
        f"Differences are to {baseline} under the same seed, their intervals percentile bootstraps over "
        "seeds with KL* held fixed, p exact sign-flip tests, by Holm adjusted over the arms of an endpoint. "
        f"“{CENSORED}”: that run never got there; nothing is extrapolated, means and intervals are then of "
        "the remaining seeds, and there is no test.",
    ]
    for endpoint in study.endpoints:
        kind = "Primary" if endpoint.primary else "Secondary"
        parts += [f"## {endpoint.label}", f"{kind} endpoint.", _endpoint_table(study, endpoint.name)]
    parts += [
        "## Mean gold over the KL that both reach",
        "Secondary endpoint, from 0 to the largest KL that arm and baseline both reach under every seed, at "
        "most 4 KL*: a range per arm, so rows are not comparable.",
        _shared_table(study),
    ]
    return "\n\n".join(parts) + "\n"


def record(study: Study) -> dict[str, Any]:
    """The study as JSON-ready values; a censored number is ``null``."""
    return {
        "baseline": study.baseline,
        "seeds": list(study.seeds),
        "level": LEVEL,
        "limits": limits(len(study.seeds), len(study.contrasts["area"])),
        "kl_star": asdict(study.peak),
        "endpoints": {e.name: {"label": e.label, "primary": e.primary, "kl": e.kl} for e in study.endpoints},
        "values": {name: dict(arms) for name, arms in study.values.items()},
        "contrasts": {
            name: {arm: asdict(contrast) for arm, contrast in arms.items()}
            for name, arms in study.contrasts.items()
        },
    }


def _endpoint_table(study: Study, name: str) -> str:
    head = ["arm", *(f"seed {seed}" for seed in study.seeds), "mean", *_CONTRAST_HEAD]
    rows = [
        [
            _cell(arm),
            *map(_number, values),
            _mean(values),
            *_contrast_cells(study.contrasts[name].get(arm)),
        ]
        for arm, values in study.values[name].items()
    ]
    return _table(head, rows)


def _shared_table(study: Study) -> str:
    head = ["arm", "nats", *(f"difference, seed {seed}" for seed in study.seeds), *_CONTRAST_HEAD]
    rows = [
        [_cell(arm), _number(c.kl), *map(_number, c.differences), *_contrast_cells(c)]
        for arm, c in study.contrasts[SHARED_NAME].items()
    ]
    return _table(head, rows)


_CONTRAST_HEAD = ("difference", f"{LEVEL:.0%} interval", "p", "p (Holm)")


def _contrast_cells(contrast: Contrast | None) -> list[str]:
    """Mean difference, interval, p and adjusted p; dashes for the baseline itself."""
    if contrast is None:
        return ["–"] * len(_CONTRAST_HEAD)
    known = [difference for difference in contrast.differences if difference is not None]
    if not known:
        return [CENSORED, "–", "–", "–"]
    part = f" ({len(known)} of {len(contrast.differences)})" if len(known) < len(contrast.differences) else ""
    interval = contrast.interval
    return [
        f"{sum(known) / len(known):+.3f}{part}",
        "–" if interval is None else f"[{interval.low:+.3f}, {interval.high:+.3f}]",
        "–" if contrast.p is None else f"{contrast.p:.3g}",
        "–" if contrast.p_holm is None else f"{contrast.p_holm:.3g}",
    ]


def _mean(values: Values) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return CENSORED
    part = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{sum(known) / len(known):.3f}{part}"


def _number(value: float | None) -> str:
    return CENSORED if value is None else f"{value:.3f}"


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))
