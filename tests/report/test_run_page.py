"""Reports of synthetic runs, written through the run log itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from html_page import HtmlPage
from synthetic_run import write_run

from r2m_ray.errors import InputError
from r2m_ray.report.data import known, read_run
from r2m_ray.report.figures import OVERVIEW, PLOTS
from r2m_ray.report.plots import Curve, Panel, moving_average
from r2m_ray.report.run_page import alarms, headlines, reading, span_of, write_report
from r2m_ray.run.vocabulary import Source


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("full"), planned=60, done=60)


@pytest.fixture(scope="module")
def full_page(full_run: Path) -> str:
    return write_report(full_run).read_text(encoding="utf-8")


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_the_page_asks_for_nothing_from_anywhere(full_page: str):
    page = HtmlPage(full_page)
    assert len(page.pictures) == len(PLOTS)
    assert all(source.startswith("data:image/png;base64,") for source in page.pictures)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.elements}
    assert not any("href" in attrs for _, attrs in page.elements)
    assert "url(" not in full_page
    assert "@import" not in full_page


def test_hostile_text_is_shown_and_not_obeyed(full_page: str):
    assert "<script>" not in full_page
    assert "\x1b" not in full_page
    assert "\u202e" not in full_page
    shown = "<script>alert(1)</script> \\x1b[2J\\u202e & <img src=https://example.org/x>"
    assert HtmlPage(full_page).text.count(shown) == 6


def test_every_plot_of_a_full_run_is_drawn(full_run: Path, full_page: str):
    drawn = {path.stem for path in (full_run / "report").glob("*.png")}
    assert drawn == {plot.name for plot in (*PLOTS, OVERVIEW)}
    width, height = png_size(full_run / "report" / "overview.png")
    assert width > 3 * height
    assert len((full_run / "metrics.jsonl").read_text().splitlines()) == 60 + 13, "the record is as it was"


def test_the_headlines_are_the_first_and_last_evaluation(full_run: Path):
    run = read_run(full_run)
    found = {headline.label: (headline.first, headline.last) for headline in headlines(run, span_of(run))}
    assert found["Frozen reward"] == pytest.approx((0.4, 1.9))
    assert found["R2M reward"] == pytest.approx((0.4, 2.5))
    assert found["Gold"] == pytest.approx((1.2, 0.0))
    assert found["KL per response"] == pytest.approx((0.0, 12.0))
    assert found["Response length"] == pytest.approx((22.0, 31.0))
    assert found["Seconds per step"][0] is None
    assert found["Seconds per step"][1] == pytest.approx(1.27, abs=0.02)


def test_the_reading_says_what_happened_to_proxy_and_gold(full_run: Path, full_page: str):
    run = read_run(full_run)
    sentence = (
        "Between the evaluations after steps 0 and 60, the frozen reward model's score rose by 1.50 "
        "while gold fell by 1.20. Gold was best after step 20, 1.60 above the last evaluation."
    )
    assert reading(run, span_of(run)) == sentence
    assert sentence in HtmlPage(full_page).text


def test_alarms_are_reported_with_the_step_they_began_at(tmp_path: Path):
    directory = write_run(tmp_path, planned=6, done=6)
    quiet = read_run(directory)
    assert alarms(quiet) == ""
    file = directory / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "step":
            row |= {"alarm/kl": 0.0, "alarm/flip_rate": 1.0 if row["step"] == 4 else 0.0}
            row["alarm/scale_ratio"] = float(row["step"] >= 3)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sentence = (
        "Alarms were on: flip_rate from step 4, in 1 of 6 steps; scale_ratio from step 3, in 4 of 6 steps."
    )
    assert alarms(read_run(directory)) == sentence
    assert sentence in HtmlPage(write_report(directory).read_text(encoding="utf-8")).text


def test_rows_show_scores_parts_badges_and_attention(full_page: str):
    page = HtmlPage(full_page)
    classes = [attrs.get("class") or "" for _, attrs in page.elements]
    badges = [kind for kind in classes if kind.startswith("badge")]
    assert badges == ["badge winner", "badge loser", "badge truncated"] * 2
    assert "courtesy 0.40" in page.text
    # Attention covers 11 prompt tokens and 9 of the 10 response tokens, in two of three rows at two steps.
    tokens = [attrs for tag, attrs in page.elements if tag == "span" and "title" in attrs]
    assert len(tokens) == 2 * 2 * 20
    assert (tokens[0]["title"], tokens[0]["style"]) == ("0.0278", "background:rgba(var(--own),0.28)")
    assert max(attrs["title"] for attrs in tokens) == "0.1111"


def test_an_interrupted_run_without_gold_says_so(tmp_path: Path):
    page = write_report(write_run(tmp_path, planned=60, done=7, gold=False)).read_text(encoding="utf-8")
    text = HtmlPage(page).text
    assert "stopped after step 7 of 60" in text
    assert (
        "Between the evaluations after steps 0 and 5, the frozen reward model's score rose by 0.12;" in text
    )


def test_one_step_without_evaluations_is_enough(tmp_path: Path):
    run_directory = write_run(tmp_path, planned=60, done=1, gold=True, evaluations=False)
    write_report(run_directory)
    drawn = {path.stem for path in (run_directory / "report").glob("*.png")}
    assert "evaluation" not in drawn
    assert {"rewards", "policy", "time", "overview"} <= drawn


def test_without_evaluations_first_and_last_are_means_of_a_tenth_of_the_steps(tmp_path: Path):
    run = read_run(write_run(tmp_path, planned=40, done=40, evaluations=False))
    span = span_of(run)
    frozen = [row["reward/frozen_mean"] for row in run.steps]
    assert span.ends("reward/frozen_mean") == pytest.approx((sum(frozen[:4]) / 4, sum(frozen[-4:]) / 4))
    assert "Between the first and the last 4 of 40 steps, the frozen" in reading(run, span)


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "metrics.jsonl", "rollouts.jsonl"])
@pytest.mark.parametrize("content", [None, b"{broken\n", b"\xff\xfe\n"])
def test_a_missing_or_damaged_file_is_named(tmp_path: Path, name: str, content: bytes | None):
    directory = write_run(tmp_path, planned=2, done=1)
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(directory / name))):
        write_report(directory)


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("metrics.jsonl", {"step": 2, "kind": "step", "omega": "high"}, r"step 2 .*\['omega'\]"),
        ("metrics.jsonl", {"step": 2, "kind": "note"}, "step 2 .*kind"),
        ("rollouts.jsonl", {"step": 2, "response": "x"}, r"step 2 lacks \['advantage', .*'truncated'\]"),
    ],
)
def test_a_row_that_is_not_the_logs_own_is_named(tmp_path: Path, name: str, line: object, reason: str):
    directory = write_run(tmp_path, planned=2, done=1)
    with (directory / name).open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=f"{name}: .*{reason}"):
        write_report(directory)


def test_a_run_that_finished_no_step_has_no_report(tmp_path: Path):
    with pytest.raises(InputError, match="no training step"):
        write_report(write_run(tmp_path, planned=2, done=0))


def test_the_smoothed_line_is_a_mean_of_what_is_known():
    values = np.array([1.0, np.nan, 3.0, 8.0])
    assert moving_average(values, 3).tolist() == [1.0, 2.0, 5.5, 5.5]
    assert np.isnan(moving_average(np.array([np.nan, np.nan]), 3)).all()


def test_only_metrics_of_the_vocabulary_are_drawn_and_where_they_are_logged():
    with pytest.raises(KeyError, match="reward/mena"):
        Panel("Reward", (Curve("reward/mena", "reward", "black"),))
    with pytest.raises(ValueError, match="no step row has kl/sequence"):
        Panel("KL", (Curve("kl/sequence", "KL", "black"),))


def test_the_synthetic_run_has_something_to_show_in_every_panel(full_run: Path):
    run = read_run(full_run)
    panels = [panel for plot in (*PLOTS, OVERVIEW) for panel in plot.panels]
    assert [panel for panel in panels if not panel.present(run)] == []
    for panel in panels:
        if isinstance(panel, Panel):
            rows = run.evaluations if panel.rows is Source.evaluation else run.steps
            assert [curve.key for curve in panel.curves if not known(rows, curve.key)] == []


def test_rows_of_earlier_versions_are_read_under_todays_names(tmp_path: Path):
    directory = write_run(tmp_path, planned=10, done=10)
    file = directory / "metrics.jsonl"
    former = {"gold/mean": "gold", "reward/mean": "reward", "reward/frozen_mean": "frozen_reward",
              "kl/sequence": "kl_sequence", "pairs/frozen_accuracy": "rm_accuracy_frozen",
              "pairs/style_accuracy": "rm_accuracy_style"}  # fmt: skip
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    today = read_run(directory)
    old = [{former.get(k, k): v for k, v in r.items()} if r["kind"] == "eval" else r for r in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert "rm_accuracy_style" in file.read_text()
    assert read_run(directory) == today
