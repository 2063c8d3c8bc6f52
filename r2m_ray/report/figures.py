"""Which metrics each figure of a run's report shows."""

from __future__ import annotations

from r2m_ray.report.data import known
from r2m_ray.report.plots import (
    AMBER,
    FROZEN,
    GOLD,
    GOLD_SCORE,
    GREY,
    KL,
    OWN,
    PROXY,
    ROSE,
    SKY,
    STEP_TIME,
    Curve,
    Panel,
    Plot,
    Special,
    draw_frontier,
    draw_times,
)
from r2m_ray.run.vocabulary import Source


def _one(
    title: str,
    key: str,
    label: str,
    unit: str | None = None,
    *,
    colour: str = OWN,
    rows: Source = Source.step,
    logarithmic: bool = False,
) -> Panel:
    """One metric."""
    return Panel(title, (Curve(key, label, colour),), unit, rows, logarithmic)


def _beside_frozen(title: str, key: str, unit: str | None = None, *, rows: Source = Source.step) -> Panel:
    """A metric of R2M's reward and the same metric of the frozen reward model's score."""
    family, name = key.split("/")
    frozen = Curve(f"{family}/frozen_{name}", "frozen RM", FROZEN, "-" if rows is Source.step else "--")
    return Panel(title, (Curve(key, "R2M", OWN), frozen), unit, rows)


def _evaluated(title: str, key: str, unit: str) -> Panel:
    return _beside_frozen(title, key, unit, rows=Source.evaluation)


FRONTIER = Special(draw_frontier, lambda run: known(run.evaluations, KL) and known(run.evaluations, PROXY))
TIMES = Special(draw_times, lambda run: known(run.steps, STEP_TIME))
SCORES = Panel(
    "Scores of held-out responses",
    (
        Curve(GOLD_SCORE, "gold", GOLD),
        Curve(PROXY, "frozen RM (proxy)", FROZEN, "--"),
        Curve("reward/mean", "R2M", OWN, "--"),
    ),
    "",
    Source.evaluation,
)
REWARD = _beside_frozen("Reward of sampled responses", "reward/mean", "")
SPREAD = _beside_frozen("Spread within groups", "reward/group_std", "standard deviation")

PLOTS = (
    Plot(
        "evaluation",
        "Over-optimization",
        "The same held-out prompts at every point. Where the frozen reward model's score continues to rise "
        "while gold falls, the policy exploits the reward model.",
        (SCORES, FRONTIER, _evaluated("Accuracy on held-out pairs", "pairs/accuracy", "fraction")),
    ),
    Plot(
        "order",
        "What the reward model can distinguish",
        "Over-optimization moves responses to where the reward model's order is wrong. Style pairs differ in "
        "courtesies and intensifiers only, value pairs in one made-up value only; one half is chance.",
        (
            _evaluated("Accuracy on the policy's own pairs", "gold/order_accuracy", "fraction"),
            _evaluated("Accuracy on style pairs", "pairs/style_accuracy", "fraction"),
            _evaluated("Accuracy on value pairs", "pairs/value_accuracy", "fraction"),
            _evaluated("Agreement with gold within prompts", "gold/correlation", "correlation"),
            _evaluated("Calibration error on held-out pairs", "pairs/calibration_error", "fraction"),
            _one(
                "Best and worst row that gold confirms",
                "gold/pair_precision",
                "precision",
                colour=GOLD,
                rows=Source.evaluation,
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
            _one("Gold of sampled responses", GOLD_SCORE, "gold", "", colour=GOLD),
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
            _one("KL per response", "policy/kl_sequence", "KL"),
            _one("KL per token", "policy/kl_token", "KL"),
            _one("Surprisal of sampled tokens", "policy/entropy", "−log π"),
        ),
    ),
    Plot(
        "responses",
        "Responses",
        "Growing length or more cut-off responses are the commonest sign that the policy exploits a reward.",
        (
            Panel(
                "Length",
                (Curve("response/length_mean", "mean", OWN), Curve("response/length_max", "longest", SKY)),
            ),
            _one("Cut off at the limit", "response/truncated_fraction", "cut off", colour=FROZEN),
        ),
    ),
    Plot(
        "spread",
        "Scale and shape of the reward",
        "A reward model that labels its own training pairs can inflate its scale; the ratio to the frozen "
        "one shows it. The entropy of a group's standardised rewards (GRE) knows shape, not scale.",
        (
            SPREAD,
            _one("Scale against the frozen RM", "reward/scale_ratio", "ratio", "ratio", logarithmic=True),
            _one("Group reward entropy", "reward/group_entropy", "GRE"),
        ),
    ),
    Plot(
        "feedback",
        "Policy feedback",
        "How much of the final embedding comes from the policy's hidden states, and where the head looks.",
        (
            Panel("Weight of the frozen embedding", (Curve("omega", "ω(t)", OWN, exact=True),), "ω"),
            _one("Size of the feedback", "rm/feedback_ratio", "‖Ĥ‖ / ‖H‖", "ratio"),
            _one("Attention over tokens", "rm/attention_entropy", "entropy", "share of log length"),
        ),
    ),
    Plot(
        "reward_model",
        "Reward model updates",
        "Winner and loser of a group are its best and worst row by the annotated reward.",
        (
            _one("Bradley–Terry loss", "rm/bradley_terry", "BT"),
            _one("Group reward entropy (GRE) loss", "rm/entropy", "GRE"),
            _one("Winner minus loser", "rm/margin", "margin"),
            Panel(
                "Pairs in the other order",
                (
                    Curve("rm/flip_rate", "at the update", OWN),
                    Curve("reward/pair_flip_rate", "by the frozen RM", FROZEN),
                ),
            ),
            Panel(
                "Gradient norms",
                (
                    Curve("rm/gradient_norm", "GREBT", OWN),
                    Curve("rm/gradient_norm_bradley_terry", "BT", AMBER),
                    Curve("rm/gradient_norm_entropy", "GRE", GREY),
                ),
            ),
            _one("Self-labelled pairs that gold confirms", "gold/pair_precision", "precision", colour=GOLD),
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
            ),
            Panel(
                "Importance ratio",
                (Curve("policy/ratio_mean", "mean", OWN), Curve("policy/ratio_max", "largest", SKY)),
                logarithmic=True,
            ),
            _one("Gradient norm", "policy/grad_norm", "norm"),
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
        "Time of each phase",
        "The weight sync runs beside the reward update, within its phase. Evaluations and checkpoints are "
        "between steps and not counted.",
        (TIMES,),
    ),
)
"""The figures of the page, in its order."""

OVERVIEW = Plot("overview", "", "", (FRONTIER, REWARD, SPREAD, TIMES))
"""One wide figure that says the most."""
