"""How fast, and on how many of people's pairs, a head is fitted best: asked of worlds in which no arm is run.

    python -m benchmarks.overoptimization.rates experiment=overoptimization lab.reward_auxiliary_steps=600

A head that reads h of the initial policy (static_h) and one that does not (refit) are fitted to the pairs
that the reward model was trained on, each pair once, and judged on pairs of a split of their own that the
same annotators labelled. Gold is never read, so a user can choose so too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.measure import write
from benchmarks.overoptimization.samples import hidden_states, load_policy
from benchmarks.overoptimization.worlds import prepare, recipe
from r2m_ray.config.schema import Config
from r2m_ray.core.batch import Hidden, RewardBatch
from r2m_ray.driver.human_pairs import drawn
from r2m_ray.engines.reward.engine import RewardEngine
from r2m_ray.tasks.data import PreferencePair, packed_pairs
from r2m_ray.tasks.note2answer.samples import preference_pairs
from r2m_ray.tasks.prepare.store import Prepared

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
MARKS = (1280, 4096, 8192)
"""Pairs after which a head is judged; the first is what 80 training steps of R2M-anchor read."""
JUDGED_BY = 4096
"""Held-out pairs: an accuracy to ± .015."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """A world's pairs as the reward model and its initial policy read them, a batch per optimizer step."""

    training: Sequence[RewardBatch]
    held_out: Sequence[RewardBatch]


def read(config: Config, prepared: Prepared) -> Pairs:
    """The pairs of a world, annotated with h of its initial policy.

    config: of a head that reads h; H_last and h depend on the world alone and serve every head.
    """
    policy, tokenizer = load_policy(prepared.policy_dir)
    engine = _engine(config, prepared, policy.config.hidden_size)

    def annotated(pairs: Sequence[PreferencePair]) -> Iterator[RewardBatch]:
        for shard in packed_pairs(tokenizer, pairs, pairs_per_shard=config.algo.prompts_per_step, version=0):
            rows = [row.tolist() for row in shard.input_T.split(shard.layout.lengths.tolist())]
            hidden_TP = torch.cat([states_LSP[-1] for states_LSP in hidden_states(policy, rows)])
            hidden = Hidden(layout=shard.layout, hidden_TP=hidden_TP)
            _, annotation = engine.annotate(shard, hidden, 1.0, 0)
            yield RewardBatch(hidden=hidden, annotation=annotation)

    every = preference_pairs(config, "train", config.prepare.pair_rows)
    order = drawn(len(every), 0, MARKS[-1], seed=config.run.seed)
    held_out = preference_pairs(config, "rates", JUDGED_BY)
    return Pairs(training=[*annotated([every[i] for i in order])], held_out=[*annotated(held_out)])


def without_h(pairs: Pairs) -> Pairs:
    """The same pairs for a head that reads no h, which takes states of width 0."""

    def narrowed(batches: Sequence[RewardBatch]) -> list[RewardBatch]:
        return [
            replace(batch, hidden=replace(batch.hidden, hidden_TP=batch.hidden.hidden_TP[:, :0]))
            for batch in batches
        ]

    return Pairs(training=narrowed(pairs.training), held_out=narrowed(pairs.held_out))


def fitted(config: Config, prepared: Prepared, pairs: Pairs) -> list[float]:
    """Accuracy on held-out pairs before any fit, and after each of ``MARKS``.

    config: names the head (``reward=…``) and ``reward.warmup_learning_rate``.
    """
    omega = config.reward.omega_floor
    engine = _engine(config, prepared, pairs.training[0].hidden.hidden_TP.shape[1])
    found, seen = [_accuracy(engine, omega, pairs.held_out)], 0
    for batch in pairs.training:
        engine.warm_up([batch], omega)
        seen += batch.annotation.layout.groups
        if seen in MARKS:
            found.append(_accuracy(engine, omega, pairs.held_out))
    return found


def _engine(config: Config, prepared: Prepared, policy_width: int) -> RewardEngine:
    return RewardEngine(
        config=config,
        model_dir=str(prepared.reward_dir),
        policy_width=policy_width,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
    )


@torch.no_grad()
def _accuracy(engine: RewardEngine, omega: float, batches: Sequence[RewardBatch]) -> float:
    rewards = []
    for batch in batches:
        note, hidden = batch.annotation, batch.hidden
        reward_N = engine.head(note.rte_ND, hidden.hidden_TP, note.layout.offsets, omega)
        rewards.append(reward_N.view(-1, 2))
    reward_G2 = torch.cat(rewards)
    return float((reward_G2[:, 0] > reward_G2[:, 1]).double().mean())


def main() -> None:
    """Prepare each seed's world where it is not there yet, and print and write what each rate comes to."""
    arg = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arg.add_argument("overrides", nargs="*", help="the world, as worlds.py takes it")
    arg.add_argument("--seeds", nargs="+", type=int, default=[5])
    arg.add_argument("--out", default="rates.json")
    parsed = arg.parse_args()
    found: dict[int, dict[str, dict[str, list[float]]]] = {}
    for seed in parsed.seeds:
        words = (*parsed.overrides, f"run.seed={seed}")
        prepared = prepare(words)
        both = read(recipe((*words, "reward=static_h")).config, prepared)
        found[seed] = {}
        for head, pairs in (("static_h", both), ("refit", without_h(both))):
            found[seed][head] = {}
            for rate in RATES:
                choice = (f"reward={head}", f"reward.warmup_learning_rate={rate}")
                config = recipe((*words, *choice)).config
                found[seed][head][f"{rate:g}"] = fitted(config, prepared, pairs)
                print(f"seed {seed}, {head} at {rate:g}: {found[seed][head][f'{rate:g}']}", flush=True)
    write(parsed.out, {"overrides": parsed.overrides, "pairs": [0, *MARKS], "seeds": found})


if __name__ == "__main__":
    main()
