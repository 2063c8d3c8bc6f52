"""The learner's loss and its sums on two rows worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from r2m_ray.config.schema import (
    Advantage,
    AlgoConfig,
    Config,
    KLEstimator,
    KLPlace,
    OldLogprobs,
    Ratio,
    TaskConfig,
)
from r2m_ray.engines.policy.objective import LossSums, Objective

# Row 0 has two tokens, row 1 one. log ρ per token: .3 and .1; −.5.
LOGP_A = torch.tensor([-0.7, -0.9, -1.5])
OLD_A = torch.tensor([-1.0, -1.0, -1.0])
ROLLOUT_A = torch.tensor([-1.2, -1.0, -2.0])
REFERENCE_A = torch.tensor([-0.9, -0.9, -1.0])
ADVANTAGE_N = torch.tensor([1.0, -2.0])
OFFSETS = torch.tensor([0, 2, 3])


def objective(**algo: object) -> Objective:
    settings = {"kl_weight": 0.1, "kl_estimator": KLEstimator.k1, **algo}
    return Objective.of(
        Config(algo=replace(AlgoConfig(), **settings), task=TaskConfig(max_new_tokens=5))  # type: ignore[arg-type]
    )


def evaluate(
    chosen: Objective, *, rows: int = 2, sampled: tuple[bool, bool] = (True, True)
) -> tuple[Tensor, LossSums, float]:
    loss, sums, ratio_max = chosen.loss(
        LOGP_A.requires_grad_(),
        old_A=OLD_A,
        rollout_A=ROLLOUT_A,
        reference_A=REFERENCE_A,
        advantage_N=ADVANTAGE_N,
        sampled_N=torch.tensor(sampled),
        offsets=OFFSETS,
        rows=rows,
    )
    return loss, sums, float(ratio_max)


def test_sequence_ratio_with_summed_kl() -> None:
    loss, sums, ratio_max = evaluate(objective())
    # ρ₀ = e^.4 is clipped to 1.2 at A = 1; ρ₁ = e^−.5 is clipped to .8 at A = −2: min(−2ρ, −1.6) = −1.6.
    kl = 0.1 * ((0.2 + 0.0) + (-0.5)) / 2
    assert loss.item() == pytest.approx(-(1.2 - 1.6) / 2 + kl)
    assert float(sums.kl_loss) == pytest.approx(kl)
    assert float(sums.ratio) == pytest.approx(math.exp(0.4) + math.exp(-0.5))
    assert ratio_max == pytest.approx(math.exp(0.4))
    assert [float(s) for s in (sums.units, sums.clipped_low, sums.clipped_high, sums.tokens)] == [2, 1, 1, 3]
    # Σ e^δ − 1 − δ: the k3 estimate of KL(π_old‖π_θ).
    assert float(sums.old_kl) == pytest.approx(sum(math.exp(d) - 1 - d for d in (0.3, 0.1, -0.5)))
    # Both rows are clipped: what is left is β/R of k1's gradient, 1 a token.
    (gradient_A,) = torch.autograd.grad(loss, LOGP_A)
    torch.testing.assert_close(gradient_A, torch.full((3,), 0.05))


def test_token_ratio_takes_each_rows_mean_of_both_terms() -> None:
    loss, sums, ratio_max = evaluate(objective(ratio=Ratio.token))
    surrogate = (1.2 + math.exp(0.1)) / 2 - 1.6
    kl = 0.1 * (0.2 / 2 - 0.5) / 2
    assert loss.item() == pytest.approx(-surrogate / 2 + kl)
    assert ratio_max == pytest.approx(math.exp(0.3))
    assert [float(s) for s in (sums.units, sums.clipped_low, sums.clipped_high)] == [3, 1, 1]


def test_dr_grpo_divides_every_row_by_the_longest_possible() -> None:
    loss, _, _ = evaluate(objective(ratio=Ratio.token, advantage=Advantage.dr_grpo))
    surrogate = (1.2 + math.exp(0.1) - 1.6) / 5
    assert loss.item() == pytest.approx(-surrogate / 2 + 0.1 * (0.2 - 0.5) / 5 / 2)


def test_rollout_log_probs_become_a_truncated_weight() -> None:
    loss, _, _ = evaluate(objective(old_logp=OldLogprobs.rollout, importance_cap=2.0, kl_weight=0.0))
    # π_old/π_rollout is e^.2 for row 0 and e¹, cut to 2, for row 1.
    assert loss.item() == pytest.approx(-(math.exp(0.2) * 1.2 - 2 * 1.6) / 2)


def test_a_row_that_was_not_sampled_has_no_kl() -> None:
    _, sums, _ = evaluate(objective(), rows=1, sampled=(False, True))
    assert float(sums.kl_loss) == pytest.approx(0.1 * -0.5)


def test_kl_in_the_reward_leaves_the_loss_alone() -> None:
    _, sums, _ = evaluate(objective(kl_place=KLPlace.reward))
    assert float(sums.kl_loss) == 0.0
