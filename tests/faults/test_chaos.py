"""Twenty faults at random in sixty steps: the run ends as if nothing had happened, and says what it cost."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]

STEPS, FAULTS = 60, 20
POINTS = (
    "rollout-0:mid_generate", "rollout-0:sample", "reference-0:logprobs", "reward-0:annotate",
    "reward-0:update", "policy-0:forward", "policy-0:optimizer",
)  # fmt: skip
LONG = (f"algo.steps={STEPS}", "checkpoint.every=3", "evaluate.every=20", "cluster.max_recoveries=5")


def chosen(seed: int) -> list[str]:
    """Faults in steps and places drawn by a seed; each role is drawn at least once."""
    draw = random.Random(seed)
    places = [*POINTS, *draw.choices(POINTS, k=FAULTS - len(POINTS))]
    steps = sorted(draw.sample(range(1, STEPS + 1), FAULTS))
    draw.shuffle(places)
    return [
        "{}@{}:{}:kill".format(p.split(":")[0], t, p.split(":")[1])
        for p, t in zip(places, steps, strict=True)
    ]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chaos(lab: Any, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    whole = lab.once("long", *LONG, deadline_s=1800)
    run = lab.run(f"chaos-{seed}", *LONG, faults=chosen(seed), deadline_s=3000)
    assert len(run.evidence) == FAULTS, run.text
    run.assert_same(whole)
    repairs: dict[str, list[float]] = {}
    for role, seconds in re.findall(r"(\w+)-\d+ replaced after ([\d.]+) s", run.text):
        repairs.setdefault(role, []).append(float(seconds))
    figures = {
        "seed": seed,
        "faults": FAULTS,
        "mttr_s": {role: round(sum(times) / len(times), 1) for role, times in sorted(repairs.items())},
        "replacements": {role: len(times) for role, times in sorted(repairs.items())},
        "goodput": round(whole.seconds / run.seconds, 3),
    }
    with capsys.disabled():
        print(f"\n{json.dumps(figures)}")
