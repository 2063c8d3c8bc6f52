"""What is run: worlds, and for each preset the arms and seeds of each world, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

from benchmarks.overoptimization.arms import ARMS, BASELINE, Arm, arms_named
from benchmarks.overoptimization.information import LEAST_SEEDS, Regime
from r2m_ray.errors import InputError, hint


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Where arms meet. regime: what it claims about h. overrides: what makes it, seeds aside,
    as worlds.py takes them.

    precheck_prompts, precheck_responses: how many prompts, and responses to each, its pre-check samples.
    least_gate_seeds: how many seeds' models the gates before any run look at, at least. despite_gates:
    whether arms are run though a gate fails; all its results then say so.
    """

    name: str
    regime: Regime
    overrides: tuple[str, ...]
    precheck_prompts: int = 512
    precheck_responses: int = 8
    least_gate_seeds: int = LEAST_SEEDS
    despite_gates: bool = False


OVEROPTIMIZATION = ("experiment=overoptimization", "lab.reward_auxiliary_steps=600")
"""The reward model's trunk learns to count before it sees a pair."""
INFORMATIVE = World(name="informative", regime=Regime.informative, overrides=OVEROPTIMIZATION)
UNINFORMATIVE = World(
    name="uninformative",
    regime=Regime.uninformative,
    overrides=(*OVEROPTIMIZATION, "feedback.noise=1.0"),
)
"""The same models, but h is noise of h's own mean and spread: what an arm gains here it gains without h."""
SELF_CORRECT = {
    rate: World(
        name=f"self_correct_{rate:g}",
        regime=Regime.informative,
        overrides=(*OVEROPTIMIZATION, f"task.self_correct_prob={rate}"),
        despite_gates=True,
    )
    for rate in (0.0, 0.3)
}
"""Less for h to know, by how often the demonstrator corrects itself: the gates say how much less."""
TOY = World(
    name="toy",
    regime=Regime.informative,
    overrides=(
        "experiment=demo",
        "prepare.sft_rows=2000",
        "prepare.sft_steps=40",
        "prepare.pair_rows=8192",
        "prepare.reward_steps=20",
        "algo.steps=4",
        "algo.prompts_per_step=8",
        "evaluate.every=2",
        "evaluate.prompts=16",
        "evaluate.pairs=32",
    ),
    precheck_prompts=40,
    precheck_responses=2,
    least_gate_seeds=1,
    despite_gates=True,
)
"""Too small to say anything: it shows within minutes that every part works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some arms of one world under the same seeds."""

    world: World
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A schedule."""

    name: str
    parts: tuple[Part, ...]

    @property
    def worlds(self) -> tuple[World, ...]:
        """Each world once, in order."""
        return tuple(dict.fromkeys(part.world for part in self.parts))

    def arms(self, world: World) -> tuple[Arm, ...]:
        """The arms of a world in the order of the table, the baseline first."""
        chosen = {arm.name for part in self.parts if part.world is world for arm in part.arms}
        return tuple(sorted((ARMS[name] for name in chosen), key=_rank))

    def seeds(self, world: World) -> tuple[int, ...]:
        """Every seed that any arm of a world is run under."""
        return tuple(sorted({seed for part in self.parts if part.world is world for seed in part.seeds}))

    def gate_seeds(self, world: World) -> tuple[int, ...]:
        """The seeds of a world that the gates before any run look at: its own, and others up to the least."""
        own = self.seeds(world)
        more = (seed for seed in count() if seed not in own)
        return (*own, *islice(more, max(0, world.least_gate_seeds - len(own))))

    def runs(self, world: World) -> Iterator[tuple[Arm, int]]:
        """Arm and seed of each run of a world: the baseline's first, then all arms of a seed before the next.

        So the gate of the baseline is decided before any other arm is run, and an interrupted schedule has
        complete seeds to compare.
        """
        parts = [part for part in self.parts if part.world is world]
        wanted = {(arm.name, seed) for part in parts for arm in part.arms for seed in part.seeds}
        yield from ((ARMS[BASELINE], seed) for seed in self.seeds(world))
        for seed in self.seeds(world):
            for arm in self.arms(world):
                if arm.name != BASELINE and (arm.name, seed) in wanted:
                    yield arm, seed


def _rank(arm: Arm) -> int:
    return [*ARMS].index(arm.name)


MAIN = arms_named(
    ["rloo", "rloo_r2m", "r2m_constant", "r2m_anchor", "r2m_anchor_constant", "static_h", "refit", "gold"]
)
"""R2M and R2M-anchor with ω constant too: where gold peaks, the cosine is still near 1."""
OTHERS = tuple(arm for arm in ARMS.values() if arm not in MAIN)
SEEDS = (0, 1, 2, 3, 4, 7)
"""The worlds of seeds 5 and 6 fail gates 3 and 4, and take no part."""
DOSES = (
    Part(world=INFORMATIVE, arms=arms_named(["rloo_bias_0", "rloo_bias_0.5", "static_h"]), seeds=(0, 1, 2)),
    *(Part(world=world, arms=arms_named(["static_h"]), seeds=(0, 1, 2)) for world in SELF_CORRECT.values()),
)
IN_CONTROL = Part(
    world=UNINFORMATIVE,
    arms=arms_named(["rloo", "rloo_r2m", "r2m_anchor", "static_h", "refit"]),
    seeds=tuple(range(3)),
)

_PRESETS = (
    Preset(
        name="smoke",
        parts=(Part(world=TOY, arms=arms_named(["rloo", "rloo_r2m"]), seeds=(0,)),),
    ),
    Preset(name="quick", parts=(Part(world=INFORMATIVE, arms=MAIN, seeds=(0, 1)),)),
    Preset(name="control", parts=(IN_CONTROL,)),
    Preset(name="doses", parts=DOSES),
    Preset(
        name="full",
        parts=(
            Part(world=INFORMATIVE, arms=MAIN, seeds=SEEDS),
            Part(world=INFORMATIVE, arms=OTHERS, seeds=(0, 1)),
            IN_CONTROL,
            *DOSES,
        ),
    ),
)
PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _PRESETS}


def chosen(name: str, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> Preset:
    """A preset, with other arms or seeds in place of its own where some are given.

    The baseline is always among the arms. InputError for a name that does not exist, with the nearest one,
    and for a seed given twice or below 0.
    """
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}; there are {', '.join(PRESETS)}.{hint(name, [*PRESETS])}")
    if min(seeds, default=0) < 0 or len({*seeds}) < len(seeds):
        raise InputError(f"--seeds {' '.join(map(str, seeds))}: give different numbers from 0 on")
    preset = PRESETS[name]
    if not arms and not seeds:
        return preset
    parts = tuple(
        Part(
            world=part.world,
            arms=arms_named(arms) if arms else part.arms,
            seeds=tuple(seeds) or part.seeds,
        )
        for part in preset.parts
    )
    return replace(preset, parts=parts)
