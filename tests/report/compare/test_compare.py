"""``r2m-ray compare``: tables, pictures and page of run directories, with gold and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from curve_fixtures import MakeRun
from html_page import HtmlPage

from r2m_ray.__main__ import main
from r2m_ray.report.compare.curves import read_comparison
from r2m_ray.report.compare.study import study

ACCURACIES = {"pairs/accuracy": (0.7, 0.72, 0.78), "pairs/frozen_accuracy": (0.7, 0.7, 0.7)}
BLIND = (None, None, None)


def with_gold(make_run: MakeRun) -> list[str]:
    """Two arms, two seeds: r2m is .5 and .7 better from KL 3 on."""
    for seed, extra in ((0, 0.5), (1, 0.7)):
        make_run(f"v{seed}", seed=seed)
        path = make_run(
            f"r{seed}",
            seed=seed,
            gold=(1.0, 2.0 + extra, 0.5 + extra),
            trained=lambda step: {"reward/scale_ratio": 1 + step / 10},
        )
    root = path.parent
    return [f"vanilla={root}/v0,{root}/v1", f"r2m={root}/r0", f"r2m={root}/r1"]


def test_arms_with_gold_are_compared_at_matched_kl(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compare", *with_gold(make_run), "--baseline", "vanilla", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "comparison.html")
    assert {path.name for path in out.iterdir()} == {
        "comparison.md", "comparison.json", "comparison.html", "effects.png", "frontier.png", "rewards.png",
        "scale_ratio.png",
    }  # fmt: skip
    data = json.loads((out / "comparison.json").read_text())
    assert data["kl_star"] == {"arm": "vanilla", "kl": 3.0, "gold": 2.0, "step": 5, "share": 0.5}
    assert data["contrasts"]["gold_at_1_kl_star"]["r2m"]["differences"] == pytest.approx([0.5, 0.7])
    page = HtmlPage((out / "comparison.html").read_text())
    assert ["r2m", "2.500", "2.700", "2.600", "+0.600", "[+0.500, +0.700]", "0.5", "0.5"] in page.rows
    assert len(page.pictures) == 4
    assert "no interval" not in page.text
    assert "KL* = 3 nats per response" in page.text


def test_without_gold_the_proxy_and_its_trust_are_compared(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [
        f"vanilla={make_run('v', gold=BLIND, evaluated=dict.fromkeys(ACCURACIES, (0.7,) * 3))}",
        f"r2m={make_run('r', gold=BLIND, kl=(0.0, 2.0, 4.0), evaluated=ACCURACIES)}",
    ]
    out = tmp_path / "out"
    assert main(["compare", *runs, "--baseline", "vanilla", "--out", str(out)]) == 0
    data = json.loads((out / "comparison.json").read_text())
    assert data["kl_star"] is None
    values = {name: (arms["vanilla"], arms["r2m"]) for name, arms in data["values"].items()}
    # Both reach 4 nats, where the frozen score is half the KL whatever the path.
    assert values["frozen_at_0.5_of_common_kl"] == ([1.0], [1.0])
    assert values["gap"] == ([4.5], [2.0])
    assert values["pairs/accuracy"] == ([0.7], [0.78])
    assert values["pairs/frozen_accuracy"] == ([0.7], [0.7])
    assert "final_gold" not in values
    text = (out / "comparison.md").read_text()
    assert "There is no gold score here" in text
    assert "Proxy against distance" in (out / "comparison.html").read_text()


def test_accuracies_that_a_run_lacks_are_left_out(make_run: MakeRun) -> None:
    runs = {"vanilla": [make_run("v", gold=BLIND)], "r2m": [make_run("r", gold=BLIND, evaluated=ACCURACIES)]}
    found = study(read_comparison(runs, "vanilla"), top=None)
    assert [endpoint.name for endpoint in found.endpoints][-1] == "gap"


def test_a_baseline_that_never_improves_is_said_to_have_no_kl_star(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [f"{arm}={make_run(arm, gold=(3.0, 2.0, 1.0))}" for arm in ("vanilla", "r2m")]
    assert main(["compare", *runs, "--baseline", "vanilla", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text.startswith("There is no KL*: the mean gold of vanilla is highest before any training")
    assert "## Final gold" in text
    assert not (tmp_path / "out" / "effects.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/v0"], "runs/v0: not ARM=RUN_DIR"),
        (["=runs/v0"], "=runs/v0: not ARM=RUN_DIR"),
        (["vanilla="], "vanilla=: not ARM=RUN_DIR"),
        (["vanilla={v},{half}"], "half-finished, its last evaluation is after step 5 of 10"),
        (["vanilla={v}", "r2m={other}"], "task.annotator_bias is 0.3 in"),
        (["vanilla={v}", "r2m={v1}"], "arm 'vanilla' has no run with run.seed=1"),
        (["vanilla={v}"], "only 'vanilla' to compare"),
        (["vanila={v}"], "no arm 'vanilla' here; there are vanila. Did you mean vanila?"),
        (["vanilla={v}", "r2m={blind}"], "no gold score. Use a task that knows one"),
        (["vanilla={blind}", "r2m={judged}"], "compared by one reward model"),
        (["vanilla={v}x"], "not the directory of a run (no config.yaml in it). Did you mean"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(
    words: list[str],
    message: str,
    make_run: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def biased(config: object) -> None:
        config.task.annotator_bias = 0.6  # type: ignore[attr-defined]

    def otherwise_judged(config: object) -> None:
        config.model.reward = "org/other"  # type: ignore[attr-defined]

    made = {
        "v": {},
        "v1": {"seed": 1},
        "half": {"seed": 1, "done": 7},
        "other": {"change": biased},
        "blind": {"gold": BLIND},
        "judged": {"gold": BLIND, "change": otherwise_judged},
    }
    text = " ".join(words)
    found = {name: make_run(name, **how) for name, how in made.items() if f"{{{name}}}" in text}
    out = tmp_path / "out"
    arguments = [word.format(**found) for word in words]
    assert main(["compare", *arguments, "--baseline", "vanilla", "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
