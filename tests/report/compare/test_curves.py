"""Reading curves and pairing arms: the numbers of a run's files, and what no comparison may mix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from curve_fixtures import MakeRun, make_curve

from r2m_ray.config.schema import Config, TaskName
from r2m_ray.errors import InputError
from r2m_ray.report.compare.curves import (
    Comparison,
    comparison,
    read_comparison,
    read_curve,
    require_gold,
)
from r2m_ray.run.files import METRICS_FILE


def test_a_curve_is_what_the_run_logged(make_run: MakeRun) -> None:
    run = make_run("a", seed=7, kl=(1e-7, -0.02, 9.0), trained=lambda step: {"x": step / 2})
    curve = read_curve(run, "vanilla")
    assert (curve.arm, curve.seed, curve.max_kl) == ("vanilla", 7, 9.0)
    assert curve.steps.tolist() == [0, 5, 10]
    assert curve.kl.tolist() == [0.0, 0.0, 9.0], "no KL is negative, and the path starts at the reference"
    assert curve.gold.tolist() == [1.0, 2.0, 0.5]
    assert curve.own.tolist() == [1e-7, -0.02, 9.0]
    assert curve.frozen.tolist() == [5e-8, -0.01, 4.5]
    assert curve.evaluations.series("gold/correct").tolist() == [1.5, 1.5, 1.5]
    assert curve.evaluations.series("kl/sequence").tolist() == [1e-7, -0.02, 9.0], "as it was measured"
    assert curve.settings["task.annotator_bias"] == 0.3
    assert curve.training.steps.tolist() == list(range(1, 11))
    assert curve.training.series("x") == pytest.approx([step / 2 for step in range(1, 11)])
    assert np.isnan(curve.training.series("y")).all()


def test_a_half_finished_run_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(InputError, match=r"a/metrics.jsonl: half-finished.*step 5 of 10.*run.resume=true"):
        read_curve(make_run("a", done=9), "vanilla")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"gold": (None, None, None)}, r"no gold score.*task=note2answer"),
        ({"gold": (1.0, float("nan"), 2.0)}, r"gold/mean has no finite value after step 5"),
        ({"kl": (0.0, 3.0, float("inf"))}, r"kl/sequence has no finite value after step 10"),
        ({"kl": (2.5, 3.0, 9.0)}, r"the KL at step 0 is 2.5 nats.*model.reference=null"),
    ],
)
def test_a_path_with_a_hole_or_another_start_is_refused(
    make_run: MakeRun, written: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        require_gold(read_curve(make_run("a", **written), "vanilla"))


def test_evaluations_start_at_step_0_and_come_once(make_run: MakeRun) -> None:
    file = make_run("a") / METRICS_FILE
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:]))
    with pytest.raises(InputError, match="no evaluation at step 0"):
        read_curve(file.parent, "vanilla")
    file.write_text("".join([*lines, lines[-1]]))
    with pytest.raises(InputError, match="out of order or twice"):
        read_curve(file.parent, "vanilla")


def change(path: str, value: object) -> Callable[[Config], None]:
    """An edit of one setting."""
    section, name = path.split(".")
    return lambda config: setattr(getattr(config, section), name, value)


def test_runs_are_paired_by_seed_whatever_their_order(make_run: MakeRun) -> None:
    runs = {
        "vanilla": [make_run("v5", seed=5), make_run("v2", seed=2)],
        "r2m": [make_run(f"r{s}", seed=s, change=change("reward.learning_rate", 1e-5)) for s in (2, 5)],
    }
    paired = read_comparison(runs, "vanilla")
    assert (paired.seeds, paired.challengers) == ((2, 5), ("r2m",))
    assert [[c.source.name for c in paired.curves(arm)] for arm in runs] == [["v2", "v5"], ["r2", "r5"]]


def test_an_unknown_arm_is_named_with_the_nearest() -> None:
    paired = comparison([make_curve([0, 1], [0, 1]), make_curve([0, 1], [0, 1], arm="r2m_anchor")], "vanilla")
    with pytest.raises(InputError, match=r"no arm 'r2m_ancor' here; .* Did you mean r2m_anchor"):
        paired.curves("r2m_ancor")
    with pytest.raises(InputError, match="no arm 'vanila'"):
        comparison([make_curve([0, 1], [0, 1])], "vanila")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("task.annotator_bias", 0.6),
        ("task.name", TaskName.preferences),
        ("prepare.pair_rows", 100),
        ("algo.temperature", 0.7),
        ("evaluate.prompts", 256),
    ],
)
def test_worlds_are_not_mixed(make_run: MakeRun, path: str, value: object) -> None:
    runs = {"vanilla": [make_run("v")], "r2m": [make_run("r", change=change(path, value))]}
    with pytest.raises(InputError, match=rf"{path} is .* in .*/v and .* in .*/r; .*share their world"):
        read_comparison(runs, "vanilla")


def test_one_seed_starts_from_one_policy_but_seeds_may_differ(make_run: MakeRun) -> None:
    policies = {seed: change("model.policy", f"sft-{seed}") for seed in (1, 2)}
    runs = {arm: [make_run(f"{arm}{s}", seed=s, change=policies[s]) for s in (1, 2)] for arm in "ab"}
    assert read_comparison(runs, "a").seeds == (1, 2)
    runs["c"] = [make_run(f"c{s}", seed=s, change=policies[3 - s]) for s in (1, 2)]
    with pytest.raises(InputError, match=r"model.policy is 'sft-1'.*start from the same policy"):
        read_comparison(runs, "a")


def test_where_things_lie_and_what_an_arm_is_may_differ(make_run: MakeRun) -> None:
    def moved(config: Config) -> None:
        config.prepare.root, config.run.root, config.cluster.cpus = "/elsewhere", "/runs", 8
        config.reward.omega_floor, config.model.reward = 1.0, "pretrained"

    runs = {"vanilla": [make_run("v")], "r2m": [make_run("r", change=moved)]}
    assert isinstance(read_comparison(runs, "vanilla"), Comparison)


def test_an_arm_is_one_method(make_run: MakeRun) -> None:
    runs = {"r2m": [make_run("a"), make_run("b", seed=1, change=change("reward.learning_rate", 1e-3))]}
    with pytest.raises(InputError, match=r"reward.learning_rate is 0.0001 .* arm 'r2m' are one method"):
        read_comparison(runs, "r2m")


def test_a_seed_that_is_missing_or_twice_is_named() -> None:
    path = [0.0, 1.0], [0.0, 1.0]
    curves = [make_curve(*path, seed=s) for s in (0, 1)] + [make_curve(*path, arm="r2m", seed=1)]
    with pytest.raises(InputError, match=r"arm 'r2m' has no run with run.seed=0"):
        comparison(curves, "vanilla")
    with pytest.raises(InputError, match=r"both arm 'r2m' with run.seed=1"):
        comparison([*curves, curves[-1]], "vanilla")


def test_more_seeds_than_can_be_tested_are_refused() -> None:
    path = [0.0, 1.0], [0.0, 1.0]
    assert comparison([make_curve(*path, seed=s) for s in range(24)], "vanilla").seeds == tuple(range(24))
    with pytest.raises(InputError, match="25 seeds; tests are exact for up to 24"):
        comparison([make_curve(*path, seed=s) for s in range(25)], "vanilla")
