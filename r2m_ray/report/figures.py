"""Which metrics each figure of a report shows."""

from __future__ import annotations

from r2m_ray.report.data import RunRecord, known
from r2m_ray.report.plots import (
    AMBER,
    FROZEN,
    GOLD,
    GREY,
    OWN,
    PHASES,
    ROSE,
    SKY,
    Curve,
    Panel,
    Plot,
    Special,
    draw_frontier,
    draw_times,
)


def _has_frontier(run: RunRecord) -> bool:
    return known(run.evaluations, "kl_sequence") and known(run.evaluations, "frozen_reward")


def _has_times(run: RunRecord) -> bool:
    return known(run.steps, "time/step")


def _both(title: str, key: str, unit: str) -> Panel:
    """A measure of evaluations for R2M's reward and for the frozen one."""
    curves = (Curve(key, "R2M", OWN), Curve(f"{key}_frozen", "frozen RM", FROZEN, "--"))
    return Panel(title, curves, unit, rows="evaluations")


FRONTIER = Special(draw_frontier, _has_frontier, ("kl_sequence", "frozen_reward", "gold"))
TIMES = Special(draw_times, _has_times, ("time/step", *(f"time/{phase}" for phase in PHASES)))
SCORES = Panel(
    "Scores of held-out responses",
    (
        Curve("gold", "gold", GOLD),
        Curve("frozen_reward", "frozen RM (proxy)", FROZEN, "--"),
        Curve("reward", "R2M", OWN, "--"),
    ),
    rows="evaluations",
)
ACCURACY = _both("Accuracy on held-out pairs", "rm_accuracy", "fraction")
REWARD = Panel(
    "Reward of sampled responses",
    (Curve("reward/mean", "R2M", OWN), Curve("reward/frozen_mean", "frozen RM", FROZEN)),
)
SPREAD = Panel(
    "Spread within groups",
    (Curve("reward/group_std", "R2M", OWN), Curve("reward/frozen_group_std", "frozen RM", FROZEN)),
    "standard deviation",
)
OMEGA = Panel("Weight of the frozen embedding", (Curve("omega", "ω(t)", OWN, exact=True),), "ω")

PLOTS = (
    Plot(
        "evaluation",
        "Over-optimization",
        "The same held-out prompts at every point. Where the frozen reward model's score goes on rising "
        "while gold falls, the policy is exploiting the reward model.",
        (SCORES, FRONTIER, ACCURACY),
    ),
    Plot(
        "order",
        "What the reward model can tell apart",
        "Over-optimization moves responses to where the reward model's order is wrong. Style pairs differ in "
        "courtesies and intensifiers only, value pairs in one made-up value only; one half is chance.",
        (
            _both("Accuracy on the policy's own pairs", "rm_accuracy_on_policy", "fraction"),
            _both("Accuracy on style pairs", "rm_accuracy_style", "fraction"),
            _both("Accuracy on value pairs", "rm_accuracy_value", "fraction"),
            _both("Agreement with gold within prompts", "gold_correlation", "correlation"),
            _both("Calibration error on held-out pairs", "calibration_error", "fraction"),
            Panel(
                "Best and worst row that gold confirms",
                (Curve("pseudo_label_precision", "precision", GOLD),),
                "fraction",
                rows="evaluations",
            ),
        ),
    ),
    Plot(
        "rewards",
        "Rewards while training",
        "The policy is trained on R2M's reward. The frozen reward model scores the same responses and never "
        "changes. In long runs, faint lines are single steps and strong ones their moving average.",
        (
            REWARD,
            Panel("Gold of sampled responses", (Curve("gold/mean", "gold", GOLD),)),
            Panel(
                "Agreement within groups",
                (
                    Curve("reward/frozen_correlation", "R2M, frozen", OWN),
                    Curve("gold/correlation", "R2M, gold", GOLD),
                    Curve("gold/frozen_correlation", "frozen, gold", FROZEN, "--"),
                ),
                "correlation",
            ),
        ),
    ),
    Plot(
        "kl",
        "Distance from the reference",
        "Estimated on the step's own samples: KL at temperature 1, surprisal at the temperature of sampling.",
        (
            Panel("KL per response", (Curve("policy/kl_sequence", "KL", OWN),), "nats"),
            Panel("KL per token", (Curve("policy/kl_token", "KL", OWN),), "nats"),
            Panel("Surprisal of sampled tokens", (Curve("policy/entropy", "−log π", OWN),), "nats"),
        ),
    ),
    Plot(
        "responses",
        "Responses",
        "Growing length or more cut-off responses are the commonest sign of a reward being gamed.",
        (
            Panel(
                "Length",
                (Curve("response/length_mean", "mean", OWN), Curve("response/length_max", "longest", SKY)),
                "tokens",
            ),
            Panel(
                "Cut off at the limit", (Curve("response/truncated_fraction", "cut off", FROZEN),), "fraction"
            ),
        ),
    ),
    Plot(
        "spread",
        "Scale and shape of the reward",
        "A reward model that labels its own training pairs can inflate its scale; the ratio to the frozen "
        "one shows it. The entropy of a group's standardised rewards (GRE) knows shape, not scale.",
        (
            SPREAD,
            Panel(
                "Scale against the frozen RM",
                (Curve("reward/scale_ratio", "ratio", OWN),),
                "ratio",
                logarithmic=True,
            ),
            Panel("Group reward entropy", (Curve("reward/group_entropy", "GRE", OWN),), "nats"),
        ),
    ),
    Plot(
        "feedback",
        "Policy feedback",
        "How much of the final embedding comes from the policy's hidden states, and where the head looks.",
        (
            OMEGA,
            Panel("Size of the feedback", (Curve("rm/feedback_ratio", "‖Ĥ‖ / ‖H‖", OWN),), "ratio"),
            Panel(
                "Attention over tokens",
                (Curve("rm/attention_entropy", "entropy", OWN),),
                "share of log length",
            ),
        ),
    ),
    Plot(
        "reward_model",
        "Reward model updates",
        "Winner and loser of a group are its best and worst row by the annotated reward.",
        (
            Panel("Bradley–Terry loss", (Curve("rm/bradley_terry", "BT", OWN),), "nats"),
            Panel("Group reward entropy (GRE) loss", (Curve("rm/entropy", "GRE", OWN),), "nats"),
            Panel("Winner minus loser", (Curve("rm/margin", "margin", OWN),), "reward"),
            Panel(
                "Pairs in the other order",
                (
                    Curve("rm/flip_rate", "at the update", OWN),
                    Curve("reward/pair_flip_rate", "by the frozen RM", FROZEN),
                ),
                "fraction",
            ),
            Panel(
                "Gradient norms",
                (
                    Curve("rm/gradient_norm", "GREBT", OWN),
                    Curve("rm/gradient_norm_bradley_terry", "BT", AMBER),
                    Curve("rm/gradient_norm_entropy", "GRE", GREY),
                ),
            ),
            Panel(
                "Self-labelled pairs that gold confirms",
                (Curve("gold/pair_precision", "precision", GOLD),),
                "fraction",
            ),
        ),
    ),
    Plot(
        "policy",
        "Policy updates",
        "Clipping and ratio say how far one step moves the policy; the mismatch is between the log-probs of "
        "the rollout engine and of the learner for the same tokens.",
        (
            Panel(
                "Clipped",
                (
                    Curve("policy/clip_fraction_high", "above", OWN),
                    Curve("policy/clip_fraction_low", "below", AMBER),
                ),
                "fraction",
            ),
            Panel(
                "Importance ratio",
                (Curve("policy/ratio_mean", "mean", OWN), Curve("policy/ratio_max", "largest", SKY)),
                logarithmic=True,
            ),
            Panel("Gradient norm", (Curve("policy/grad_norm", "norm", OWN),)),
            Panel(
                "Learner – rollout mismatch",
                (Curve("policy/mismatch_mean", "mean", OWN), Curve("policy/mismatch_max", "largest", ROSE)),
                "|Δ log-prob|",
                logarithmic=True,
            ),
        ),
    ),
    Plot(
        "time",
        "Where the time goes",
        "The weight sync runs beside the reward update, within its phase. Evaluations and checkpoints are "
        "between steps and not counted.",
        (TIMES,),
    ),
)
"""The figures of the page, in its order."""

OVERVIEW = Plot("overview", "", "", (FRONTIER, REWARD, SPREAD, TIMES))
"""One wide figure that says the most."""
