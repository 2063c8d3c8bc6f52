"""Pictures of a comparison: the numbers of their lines, bars and dots."""

from __future__ import annotations

import io

import numpy as np
import pytest
from curve_fixtures import make_curve
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from PIL import Image

from r2m_ray.report.compare.compare import effects_figure, gallery
from r2m_ray.report.compare.curves import Comparison, comparison
from r2m_ray.report.compare.matched import mean_peak
from r2m_ray.report.compare.pictures import (
    COLUMNS,
    effects,
    frontiers,
    mean_line,
    over_training,
    rewards,
)
from r2m_ray.report.compare.study import study
from r2m_ray.report.plots import png

KL = np.array([0.0, 1.0, 4.0, 9.0])


def arms() -> Comparison:
    """vanilla peaks at KL 4; better has .5 and .7 more from there on; slow never leaves KL 1."""
    gold = np.array([1.0, 2.0, 3.0, 1.0])
    curves = []
    for seed, extra in ((0, 0.5), (1, 0.7)):
        curves += [
            make_curve(KL, gold, seed=seed, frozen=KL / 2 + seed),
            make_curve(KL, gold + np.array([0, 0, extra, extra]), arm="better", seed=seed),
            make_curve(KL / 9, gold, arm="slow", seed=seed),
        ]
    return comparison(curves, "vanilla")


def lines(axes: Axes, colour: str | None = None) -> list[Line2D]:
    """Thick lines, which are means, and thin ones, which are seeds, in the order they were drawn."""
    return [line for line in axes.get_lines() if colour in (None, line.get_color())]


def test_the_frontier_shows_every_seed_and_the_mean_against_the_root_of_kl() -> None:
    paired = arms()
    figure = frontiers(paired.arms, "vanilla")
    assert figure is not None
    vanilla, better, slow = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["vanilla", "better", "slow"]
    solid = [line for line in vanilla.get_lines() if line.get_linestyle() == "-"]
    dashed = [line for line in vanilla.get_lines() if line.get_linestyle() == "--"]
    assert [line.get_linewidth() for line in solid] == [0.9, 0.9, 1.9], "two seeds, then their mean"
    for line in solid:
        assert line.get_xdata() == pytest.approx([0, 1, 2, 3])
        assert line.get_ydata() == pytest.approx([0, 1, 2, 0])
    assert dashed[1].get_ydata() == pytest.approx(KL / 2), "the proxy's change, not its level"
    grey, *own = [line for line in better.get_lines() if line.get_linestyle() == "-"]
    assert grey.get_ydata() == pytest.approx([0, 1, 2, 0]), "the baseline's mean"
    assert own[-1].get_ydata() == pytest.approx([0, 1, 2.6, 0.6])
    assert lines(slow)[-1].get_xdata() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_scores_are_drawn_over_steps_and_gold_only_where_it_is_known() -> None:
    figure = rewards(arms().arms, "vanilla")
    assert figure is not None
    means = [line for line in lines(figure.axes[0]) if line.get_linewidth() == 1.9]
    assert [line.get_label() for line in means] == ["gold", "frozen RM", "own RM"]
    assert means[0].get_xdata() == pytest.approx([0, 5, 10, 15])
    assert means[1].get_ydata() == pytest.approx(KL / 2 + 0.5)
    blind = rewards({"vanilla": [make_curve(KL, [np.nan] * 4)]}, "vanilla")
    assert blind is not None
    assert {line.get_color() for line in lines(blind.axes[0])} == {means[1].get_color(), means[2].get_color()}


def test_without_gold_the_baseline_is_drawn_by_its_proxy() -> None:
    unknown = [np.nan] * 4
    blind = {arm: [make_curve(KL, unknown, arm=arm, frozen=KL + 1)] for arm in ("vanilla", "other")}
    for draw, proxy in ((frontiers, KL), (rewards, KL + 1)):
        figure = draw(blind, "vanilla")
        assert figure is not None
        grey = lines(figure.axes[1])[0]
        assert (grey.get_label(), grey.get_ydata()) == ("vanilla", pytest.approx(proxy))


def test_panels_fill_lines_of_four() -> None:
    many = {f"arm{i}": [make_curve(KL, KL, arm=f"arm{i}")] for i in range(COLUMNS + 1)}
    figure = frontiers(many, "arm0")
    assert figure is not None
    tops = [round(axes.get_position().y1, 3) for axes in figure.axes]
    assert len(set(tops[:COLUMNS])) == 1
    assert tops[COLUMNS] < tops[0]
    assert frontiers({}, "arm0") is None


def test_effects_are_means_intervals_and_seeds() -> None:
    paired = arms()
    found = study(paired, mean_peak(paired.curves("vanilla")))
    figure = effects(found)
    assert figure is not None
    assert len(figure.axes) == 4
    at_peak = figure.axes[0]
    assert at_peak.get_title(loc="left") == "Gold at KL* = 4 nats"
    assert [text.get_text() for text in at_peak.get_yticklabels()] == ["better", "slow"]
    (bar,) = at_peak.patches
    assert bar.get_width() == pytest.approx(0.6)
    interval, dots, zero = at_peak.get_lines()
    contrast = found.contrasts["gold_at_1_kl_star"]["better"]
    assert contrast.interval is not None
    assert interval.get_xdata() == pytest.approx([contrast.interval.low, contrast.interval.high])
    assert dots.get_xdata() == pytest.approx([0.5, 0.7])
    assert zero.get_xdata() == pytest.approx([0, 0])
    assert [text.get_text().strip() for text in at_peak.texts] == ["censored"], "slow never gets to KL 4"
    assert [text.get_position()[1] for text in at_peak.texts] == [1]


def test_metrics_of_training_are_drawn_for_the_arms_that_have_them() -> None:
    seeds = [0.6, 0.5, np.nan, 0.3], [0.8, 0.7, 0.6, np.nan]
    runs = {
        "vanilla": [make_curve(KL, KL)],
        "r2m": [make_curve(KL, KL, seed=i, trained={"precision": v}) for i, v in enumerate(seeds)],
    }
    figure = over_training(runs, "vanilla", "precision", "precision")
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "r2m"
    first, second, mean = lines(axes)
    assert first.get_ydata() == pytest.approx([0.6, 0.5, np.nan, 0.3], nan_ok=True)
    assert second.get_xdata() == pytest.approx([1, 2, 3, 4])
    # Means .7, .6, .6, .3, averaged over two neighbours on each side.
    assert mean.get_ydata() == pytest.approx([1.9 / 3, 2.2 / 4, 2.2 / 4, 1.5 / 3])
    assert over_training(runs, "vanilla", "scale", "scale") is None


def test_a_mean_is_of_what_is_finite() -> None:
    values = [np.array([1.0, np.nan, np.nan]), np.array([3.0, 5.0, np.nan])]
    assert mean_line(values) == pytest.approx([2, 5, np.nan], nan_ok=True)


def test_the_gallery_leaves_out_what_would_be_empty() -> None:
    paired = arms()
    figures = gallery(paired.arms, "vanilla")
    assert list(figures) == ["frontier", "rewards"]
    assert figures["frontier"].png.startswith(b"\x89PNG")
    again = frontiers(paired.arms, "vanilla")
    assert again is not None
    assert png(again) == figures["frontier"].png, "a picture repeats to the byte"


def test_a_picture_keeps_its_colours_with_a_palette() -> None:
    """No line changes its colour by more than a reader could see, at half the size or less."""
    figure = frontiers(arms().arms, "vanilla")
    assert figure is not None
    whole = io.BytesIO()
    figure.savefig(whole, format="png")
    small = png(figure)
    assert len(small) < len(whole.getvalue()) / 2
    pixels, kept = (np.asarray(Image.open(each).convert("RGB"), int) for each in (whole, io.BytesIO(small)))
    assert pixels.shape == kept.shape
    assert np.abs(pixels - kept).max() <= 16, "of 255"


def test_without_a_primary_endpoint_there_are_no_bars() -> None:
    falling = comparison(
        [make_curve(KL, -KL), make_curve(KL, 1 - KL, arm="other")],
        "vanilla",
    )
    found = study(falling, mean_peak(falling.curves("vanilla")))
    assert found.peak is None
    assert effects_figure(found) is None
    assert found.contrasts["final_gold"]["other"].differences == pytest.approx((1.0,))
