"""Which layers know good responses from bad: similarity of hidden states by gold label, for a policy and the
reward model that reads the same responses. In miniature the paper's Figures 1, 2 and 9 and its Table 5.

    python -m benchmarks.overoptimization.layers experiment=overoptimization lab.reward_auxiliary_steps=600
    python -m benchmarks.overoptimization.layers … --seeds 0 --run runs/rloo-seed-0

The labels are the better and the worse half of each prompt's responses. What the policy's embeddings show is
in the words alone, and its layers have to show more; the reward model is read at the last token, whose
embedding is always the same. Where all states of a layer are almost parallel, its differences are small:
compare them with how far the cosines are from 1. Beside the JSON is a picture of the same name.

Axes: N responses, L layers (embeddings first, the last after the final norm), P width of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.measure import write
from benchmarks.overoptimization.samples import (
    Samples,
    hidden_states,
    load_policy,
    parser,
    policy_rows,
    sample,
)
from benchmarks.overoptimization.similarity import Labels, Similarity, halves, similarity
from benchmarks.overoptimization.worlds import prepare, recipe
from r2m_ray.config.compose import load_saved
from r2m_ray.config.schema import Config
from r2m_ray.engines.reward.trunk import RewardTrunk
from r2m_ray.engines.text import conversation_ids
from r2m_ray.errors import InputError, RunError, printable, redacted
from r2m_ray.report.compare.pictures import SEED, mean_line
from r2m_ray.report.data import Series
from r2m_ray.report.plots import FROZEN, GREY, OWN, STYLE, finish, grid, png
from r2m_ray.run.checkpoint import CHECKPOINTS, Checkpoints
from r2m_ray.run.files import CONFIG_FILE
from r2m_ray.tasks.models import Models
from r2m_ray.tasks.prepare.measurement import prepared_trunk, seeded
from r2m_ray.tasks.prepare.store import Prepared

INITIAL, TRAINED = "initial policy", "after training"
COLOURS = {INITIAL: OWN, TRAINED: FROZEN}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One model's states: similarity over pairs of responses to one prompt, and to two different ones."""

    within: Similarity
    across: Similarity


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """What two models make of the same responses of one policy.

    gold: mean over all responses. different: the share of them that no earlier one to the same prompt
    repeats; the readings are of these alone. policy: states that predict the response, their mean.
    reward_model: the state that its score is read from.
    """

    gold: float
    different: float
    policy: Reading
    reward_model: Reading


PANELS: tuple[tuple[str, Callable[[Layers], Similarity]], ...] = (
    ("Policy, within prompts", lambda found: found.policy.within),
    ("Policy, across prompts", lambda found: found.policy.across),
    ("RM, within prompts", lambda found: found.reward_model.within),
    ("RM, across prompts", lambda found: found.reward_model.across),
)


def layers(
    config: Config, prepared: Prepared, directory: Path, prompts: int, responses_per_prompt: int
) -> Layers:
    """Sample from the policy in a directory, and compare the states of its responses by their gold.

    The prompts belong to a split of their own. Everything is drawn from ``config.run.seed``. Raises
    InputError where so few responses have no pairs to compare.
    """
    policy, tokenizer = load_policy(directory)
    with seeded(config.run.seed):
        drawn = sample(config, policy, tokenizer, "layers", prompts, responses_per_prompt)
    samples = distinct(drawn)
    label_N = halves(samples.gold_N, samples.prompt_N)
    policy_LNP = policy_states(policy, tokenizer, samples)
    reward_LND = reward_states(prepared_trunk(config, prepared.reward_dir), samples)
    try:
        return Layers(
            gold=float(drawn.gold_N.mean()),
            different=len(samples.responses) / len(drawn.responses),
            policy=_reading(policy_LNP, label_N, samples),
            reward_model=_reading(reward_LND, label_N, samples),
        )
    except ValueError as error:
        raise InputError(f"{directory}: {error}; give more --prompts or --responses") from error


def distinct(samples: Samples) -> Samples:
    """Each response to a prompt once: a copy has its original's gold and its states, in any layer."""
    first = {
        row: n for n, row in reversed([*enumerate(zip(samples.prompt_N, samples.responses, strict=True))])
    }
    kept = sorted(first.values())
    return Samples(
        prompts=[samples.prompts[n] for n in kept],
        responses=[samples.responses[n] for n in kept],
        gold_N=samples.gold_N[kept],
        prompt_N=samples.prompt_N[kept],
    )


def policy_states(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples) -> Series:
    """Of each layer the mean of the states that predict a response, float64 [L, N, P]."""
    rows, firsts = policy_rows(tokenizer, samples)
    states = zip(firsts, hidden_states(policy, rows), strict=True)
    return _stacked(states_LSP[:, first:].mean(1) for first, states_LSP in states)


def reward_states(trunk: RewardTrunk, samples: Samples) -> Series:
    """Of each layer the state of a conversation's last token, float64 [L, N, P]; the last one is H_last."""
    rows = [
        conversation_ids(trunk.tokenizer, prompt, response)
        for prompt, response in zip(samples.prompts, samples.responses, strict=True)
    ]
    return _stacked(states_LSP[:, -1] for states_LSP in hidden_states(trunk.model, rows))


def trained_policy(run: Path, config: Config, prepared: Prepared) -> Path:
    """Where a run's newest checkpoint has its policy; InputError for a run without, or of another world."""
    saved = load_saved(run / CONFIG_FILE, [])
    saved.prepare.root = config.prepare.root
    try:
        start = Models.of(saved).policy
    except InputError as error:
        raise InputError(f"{run}: its world is another one, which is not here: {error}") from error
    # The folder is named by a digest of what the models are made of; where it lies may have changed since.
    if Path(start).parts[-2:] != prepared.policy_dir.resolve().parts[-2:]:
        raise InputError(f"{run}: it started from {start} and not from {prepared.policy_dir}; name its world")
    checkpoint = Checkpoints(run / CHECKPOINTS, keep=1).newest()
    if checkpoint is None:
        raise InputError(f"{run}: it has no checkpoint; set checkpoint.every in such a run")
    return checkpoint / "policy"


def picture(found: Mapping[int, Mapping[str, Layers]]) -> Figure:
    """By layer how much more alike states of the same label are; every seed thin, their mean thick."""
    with rc_context(STYLE):
        figure, cells = grid(len(PANELS), len(PANELS))
        for place, ((title, read), axes) in enumerate(zip(PANELS, cells, strict=True)):
            axes.axhline(0, color=GREY, linewidth=0.8)
            for name, colour in COLOURS.items():
                lines = [read(seed[name]).difference_L for seed in found.values() if name in seed]
                for line in lines:
                    axes.plot(range(len(line)), line, color=colour, **SEED)
                if lines:
                    axes.plot(range(len(lines[0])), mean_line(lines), color=colour, label=name, marker="o",
                              markersize=3.5)  # fmt: skip
                    axes.set_xticks(range(len(lines[0])))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1000 * value:g}"))
            y_label = "same − different, × 1000" if place == 0 else ""
            finish(axes, title, "layer (0: embeddings)", y_label)
            if place and (legend := axes.get_legend()):
                legend.remove()
    return figure


def record(found: Layers) -> dict[str, Any]:
    """The numbers of one policy as JSON takes them, lists by layer."""

    def listed(one: Similarity) -> dict[str, Any]:
        return {
            "same": one.same_L.tolist(),
            "different": one.different_L.tolist(),
            "difference": one.difference_L.tolist(),
            "same_pairs": one.same_pairs,
            "different_pairs": one.different_pairs,
        }

    readings = {"policy": found.policy, "reward_model": found.reward_model}
    return {
        "gold": found.gold,
        "different": found.different,
        **{
            name: {"within": listed(one.within), "across": listed(one.across)}
            for name, one in readings.items()
        },
    }


def measure(arguments: Sequence[str] | None) -> None:
    """Prepare each seed's world where it is not there yet, sample, compare, write and draw."""
    arg = parser(__doc__, prompts=128, out="layers.json")
    arg.add_argument(
        "--run", nargs="+", type=Path, default=[], metavar="DIR", help="a run of each seed, or of some"
    )
    parsed = arg.parse_args(arguments)
    out = Path(parsed.out)
    if out.suffix != ".json":
        raise InputError(f"--out {out}: give a name that ends in .json")
    runs = _by_seed(parsed.run, parsed.seeds)
    found: dict[int, dict[str, Layers]] = {}
    sources: dict[int, dict[str, str]] = {}
    for seed in parsed.seeds:
        words = (*parsed.overrides, f"run.seed={seed}")
        config, prepared = recipe(words).config, prepare(words)
        policies = {INITIAL: prepared.policy_dir}
        if seed in runs:
            policies[TRAINED] = trained_policy(runs[seed], config, prepared)
        found[seed] = {
            name: layers(config, prepared, directory, parsed.prompts, parsed.responses)
            for name, directory in policies.items()
        }
        sources[seed] = {name: str(directory) for name, directory in policies.items()}
        for name, one in found[seed].items():
            print(f"seed {seed}, {name}: gold {one.gold:.3f}", flush=True)
            for title, read in PANELS:
                values = " ".join(f"{value:+.4f}" for value in read(one).difference_L)
                print(f"  {title}: {values}", flush=True)
    seeds = {
        seed: {name: {"source": sources[seed][name], **record(one)} for name, one in policies.items()}
        for seed, policies in found.items()
    }
    amount = {"prompts": parsed.prompts, "responses": parsed.responses}
    write(out, {"overrides": parsed.overrides, **amount, "seeds": seeds})
    out.with_suffix(".png").write_bytes(png(picture(found)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code, as `r2m-ray` does."""
    try:
        measure(arguments)
    except (InputError, RunError) as error:
        print(f"error: {printable(redacted(str(error)), lines=True)}", file=sys.stderr)
        return error.exit_code
    return 0


def _reading(hidden_LNP: Series, label_N: Labels, samples: Samples) -> Reading:
    return Reading(
        within=similarity(hidden_LNP, label_N, samples.prompt_N, within_prompts=True),
        across=similarity(hidden_LNP, label_N, samples.prompt_N, within_prompts=False),
    )


def _stacked(states: Iterable[Tensor]) -> Series:
    hidden_LNP: Series = torch.stack([*states], dim=1).double().numpy()
    return hidden_LNP


def _by_seed(runs: Sequence[Path], seeds: Sequence[int]) -> dict[int, Path]:
    """Runs by the seed that their configuration has, which must be one of ``seeds``, each at most once."""
    found: dict[int, Path] = {}
    for run in runs:
        seed = load_saved(run / CONFIG_FILE, []).run.seed
        if seed in found or seed not in seeds:
            why = f"so is {found[seed]}" if seed in found else "no such seed is measured"
            raise InputError(f"{run}: it is of seed {seed}, and {why}; give one run of each of --seeds")
        found[seed] = run
    return found


if __name__ == "__main__":
    sys.exit(main())
