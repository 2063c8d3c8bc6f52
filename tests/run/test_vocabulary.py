"""The registry of metrics: names are unique, complete and current."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from r2m_ray.driver.monitor import NONFINITE
from r2m_ray.run.progress import HEADLINES
from r2m_ray.run.vocabulary import (
    FAMILIES,
    FORMER,
    METRICS,
    REGISTRY,
    Source,
    current_name,
    current_row,
    metric,
    reference,
)
from tests.support.synthetic_run import evaluation_row, step_row


def source_of(name: str) -> Source:
    return REGISTRY[name].source if name in REGISTRY else Source.both


def test_each_name_is_defined_once_with_a_unit_and_a_sentence() -> None:
    assert [name for name, count in Counter(m.name for m in METRICS).items() if count > 1] == []
    assert [m.name for m in METRICS if not m.unit or not m.meaning.endswith(".")] == []


def test_every_metric_of_a_step_and_of_an_evaluation_is_in_the_registry() -> None:
    step = step_row(0.5, random.Random(0), gold=True)
    evaluation = current_row(evaluation_row(0.5, gold=True))
    assert {source_of(metric(name)) for name in step} <= {Source.step, Source.both}
    assert {source_of(metric(name)) for name in evaluation} <= {Source.evaluation, Source.both}


def test_a_name_that_no_row_has_is_an_error() -> None:
    assert metric("time/sample") == "time/sample"
    for name in ("reward", "reward/means", "kl/tokens", ""):
        with pytest.raises(KeyError, match="is not a metric"):
            metric(name)


def test_names_of_earlier_versions_map_to_metrics_and_todays_stay() -> None:
    assert set(FORMER.values()) <= set(REGISTRY)
    assert not set(FORMER) & set(REGISTRY)
    assert all(current_name(name) == name for name in REGISTRY)
    names = {
        "gold": "gold/mean",
        "rm_accuracy_frozen": "pairs/frozen_accuracy",
        "rm_accuracy_on_policy_frozen": "gold/frozen_order_accuracy",
        "rm_accuracy_style": "pairs/style_accuracy",
        "rm_accuracy_style_frozen": "pairs/frozen_style_accuracy",
    }
    assert current_row(names) == {today: today for today in names.values()}


def test_what_is_shown_and_guarded_is_reported() -> None:
    """An evaluation and a step share the label of one quantity, and never both of its names."""
    for source in (Source.step, Source.evaluation):
        labels = [label for name, label in HEADLINES.items() if source_of(name) in (source, Source.both)]
        assert len(labels) == len(set(labels))
    assert all(source_of(name) in (Source.step, Source.both) for name in NONFINITE)


def test_the_reference_has_every_metric_and_family_once() -> None:
    page = reference()
    for m in METRICS:
        assert page.count(f"| `{m.name}` | {m.unit} | {m.meaning} |\n") == 1
    assert all(page.count(f"- `{prefix}…`: ") == 1 for prefix in FAMILIES)
    steps = page.split("## Training steps\n")[1].split("## Evaluations\n")[0]
    assert "`omega`" in steps
    assert "`kl/token`" not in steps
