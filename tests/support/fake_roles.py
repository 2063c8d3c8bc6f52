"""Roles in this process that note what they were asked, and real runs of the driver with them.

Log, checkpoints, stop request, alarms and evaluator are the real ones; only the engines are made up.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from r2m_ray.config.schema import AlgoConfig, Config, RewardConfig, WandbMode
from r2m_ray.core.batch import (
    Prompt,
    ReferenceKL,
    RowText,
    SampledRows,
    SamplePlan,
    Scores,
    Trajectories,
    pack_rows,
)
from r2m_ray.core.roles import LabelledPairs, Roles
from r2m_ray.driver.evaluate import Evaluator
from r2m_ray.driver.human_pairs import HumanPairs
from r2m_ray.driver.loop import train
from r2m_ray.driver.rows import Rows
from r2m_ray.driver.step import omega_at
from r2m_ray.run.checkpoint import CHECKPOINTS, Checkpoints, step_of
from r2m_ray.run.log import RunLog
from r2m_ray.run.stop import StopRequest
from r2m_ray.run.vocabulary import MACHINE_PREFIXES
from r2m_ray.tasks.data import PreferencePair, PromptOrder

K = 2
PROMPTS = tuple(f"p{i}" for i in range(12))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What reward model, reference and task say of a response. kl: to the reference, by any estimator."""

    own: float
    frozen: float = 0.0
    gold: float | None = None
    kl: float = 0.0


class Sealed:
    """A reference that the roles here can open and nobody else: it has no handle, and no await."""

    def __init__(self, record: Any) -> None:
        self._record = record


def opened(refs: Sequence[Any]) -> list[Any]:
    return [ref._record for ref in refs]


def numbered(step: int, prompt: Prompt, row: int) -> str:
    """Row n of every group responds ``wn``."""
    return f"w{row}"


def by_number(response: str) -> Verdict:
    """The own reward of ``wn`` is n."""
    return Verdict(own=float(response[1:]))


@dataclass
class FakeRoles:
    """Four roles and the list of what they were asked, in order.

    respond: the text of row j of a prompt in a step; a word is a token. A text that ends in "…" was cut off,
    and one with "?" was sampled with a log-prob that is not finite. judge: of a response's last word.
    reports: the policy's statistics of a step. during: what happens while the policy is updated. lag: steps
    by which the rollout engine's weights are behind.
    """

    respond: Callable[[int, Prompt, int], str] = numbered
    judge: Callable[[str], Verdict] = by_number
    reports: Callable[[int], Mapping[str, float]] = lambda step: {}
    during: Callable[[int], Awaitable[None]] | None = None
    lag: int = 0
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    """The references that a role got or returned last, by method and argument."""
    version: int = -1
    updates: int = 0
    head_updates: int = 0

    def of(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of each call of a method."""
        return [call[1:] for call in self.calls if call[0] == name]

    @property
    def names(self) -> list[str]:
        """The methods called."""
        return [call[0] for call in self.calls]

    async def sample(self, plans: Sequence[SamplePlan]) -> Any:
        step = plans[0].step
        prompts = [prompt.text for plan in plans for prompt in plan.prompts]
        self.calls.append(("sample", step, self.version, prompts))
        shards = [self._sampled(plan) for plan in plans]
        hidden = [Sealed(f"h of step {step}") for _ in shards]
        rows = [Sealed(shard) for shard in shards]
        self.given |= {"sample": rows, "sampled h": hidden}
        return [SampledRows.of(shard) for shard in shards], rows, hidden

    def _sampled(self, plan: SamplePlan) -> Trajectories:
        groups = [[self.respond(plan.step, p, j) for j in range(plan.group_size)] for p in plan.prompts]
        texts = [text for group in groups for text in group]
        tokens = [text.removesuffix("…").split() for text in texts]
        ids = [
            [5] * len(words) + [2] * (not text.endswith("…"))
            for words, text in zip(tokens, texts, strict=True)
        ]
        return pack_rows(
            [prompt.text for prompt in plan.prompts],
            [[1, 4] for _ in plan.prompts],
            ids,
            texts,
            logprobs=[
                [math.nan if "?" in text else -1.0] * len(row) for row, text in zip(ids, texts, strict=True)
            ],
            truncated=[text.endswith("…") for text in texts],
            version=self.version - self.lag,
        )

    async def texts(self, trajectories: Any, rows: int) -> list[RowText]:
        (shard,) = opened([trajectories])
        self.calls.append(("texts", rows))
        found = zip(shard.row_prompts, shard.responses, shard.layout.lengths.tolist(), strict=True)
        texts = [RowText(prompt=p, response=r, tokens=tuple(f"t{i}" for i in range(n))) for p, r, n in found]
        return texts[:rows]

    async def annotate(self, trajectories: Any, hidden: Any, *, omega: float, step: int) -> Any:
        self.calls.append(("annotate", step, omega, opened(hidden)))
        shards = opened(trajectories)
        notes = [Sealed(shard.layout) for shard in shards]
        self.given["annotate"] = notes
        return [self._scores(shard) for shard in shards], notes

    def _judged(self, shard: Trajectories) -> list[Verdict]:
        return [self.judge(text.split(" ")[-1]) for text in shard.responses]

    def _scores(self, shard: Trajectories) -> Scores:
        found = self._judged(shard)
        gold = torch.tensor([v.gold for v in found if v.gold is not None], dtype=torch.float64)
        return Scores(
            reward_N=torch.tensor([v.own for v in found]),
            frozen_reward_N=torch.tensor([v.frozen for v in found]),
            response_id_N=torch.arange(len(found)),
            gold={"total": gold, "right": torch.ones_like(gold)} if len(gold) else {},
        )

    async def logprobs(self, trajectories: Any) -> Any:
        self.calls.append(("reference",))
        kl = [torch.tensor([v.kl for v in self._judged(shard)]) for shard in opened(trajectories)]
        refs = [Sealed("log-probs") for _ in kl]
        self.given["reference"] = refs
        return [ReferenceKL(sampled_N=kl_N, penalty_N=kl_N) for kl_N in kl], refs

    async def attention(self, hidden: Any, annotation: Any, rows: int) -> list[list[float]]:
        """All weight on one token, which moves by one with each update of the head."""
        self.calls.append(("attention", *opened([hidden])))
        (layout,) = opened([annotation])
        weights = [[float(i == self.head_updates) for i in range(n)] for n in layout.lengths.tolist()]
        return weights[:rows]

    async def update_policy(self, trajectories: Any, advantage: Any, reference: Any, hidden: Any) -> Any:
        self.calls.append(("policy", [a.tolist() for a in advantage]))
        self.given |= {"policy rows": trajectories, "policy reference": reference, "policy h": hidden}
        step = self.version + 1
        if self.during is not None:
            await self.during(step)
        self.updates += 1
        fresh = [Sealed(f"h after {self.updates} updates") for _ in trajectories]
        self.given["fresh h"] = fresh
        return {"mismatch_mean": 0.01, "optimizer_steps": float(self.updates), **self.reports(step)}, fresh

    async def hidden(self, trajectories: Any) -> list[Sealed]:
        self.calls.append(("states", [shard.prompts for shard in opened(trajectories)]))
        return [Sealed(f"h after {self.updates} updates") for _ in trajectories]

    async def warm_up(self, human: LabelledPairs, *, omega: float) -> Mapping[str, float]:
        groups = [layout.groups for layout in opened(human.annotation)]
        self.calls.append(("warm up", groups, opened(human.hidden), omega))
        return {"human_accuracy": 0.5, "bradley_terry_human": 0.7, "nonfinite_steps": 0.0}

    async def update_reward(
        self, hidden: Any, annotation: Any, human: LabelledPairs, *, omega: float, step: int
    ) -> Mapping[str, float]:
        groups = [layout.groups for layout in opened(human.annotation)]
        self.calls.append(("reward", step, omega, opened(hidden), opened(human.hidden), groups))
        self.given |= {"reward h": hidden, "reward annotation": annotation}
        self.head_updates += 1
        return {"loss": float(self.head_updates)}

    async def sync(self, *, version: int) -> Mapping[str, float]:
        self.calls.append(("sync", version))
        self.version = version
        return {"bytes": 3.0}

    def stored(self, name: str, counter: str) -> dict[str, Any]:
        """How a role saves and loads its counter."""

        async def save(directory: Path) -> None:
            (directory / name).mkdir()
            (directory / name / "state.json").write_text(json.dumps(getattr(self, counter)))

        async def load(directory: Path) -> None:
            setattr(self, counter, json.loads((directory / name / "state.json").read_text()))

        return {"save": save, "load": load}

    def roles(self) -> Roles:
        return Roles(
            rollout=SimpleNamespace(sample=self.sample, texts=self.texts),
            policy=SimpleNamespace(
                update=self.update_policy, hidden=self.hidden, **self.stored("policy", "updates")
            ),
            reference=SimpleNamespace(logprobs=self.logprobs),
            reward=SimpleNamespace(
                annotate=self.annotate,
                update=self.update_reward,
                warm_up=self.warm_up,
                attention=self.attention,
                **self.stored("reward_head", "head_updates"),
            ),
            sync=self.sync,
            share=Sealed,
        )


@dataclass(frozen=True, kw_only=True)
class World:
    """Where a run happens, and what it is held against."""

    directory: Path
    tokenizer: PreTrainedTokenizerFast
    eval_prompts: Sequence[str] = ()
    eval_pairs: Sequence[PreferencePair] = ()
    counterfactual_pairs: Mapping[str, Sequence[PreferencePair]] = field(default_factory=dict)
    train_pairs: Sequence[PreferencePair] = tuple(
        PreferencePair(prompt=f"w{i}", chosen="w3", rejected="w4") for i in range(10)
    )

    def evaluator(self, config: Config, fake: FakeRoles) -> Evaluator:
        return Evaluator(
            config,
            fake.roles(),
            prompts=self.eval_prompts,
            pairs=self.eval_pairs,
            counterfactual_pairs=self.counterfactual_pairs,
            final_omega=omega_at(config, config.algo.steps),
            tokenizer=self.tokenizer,
        )

    def measure(self, config: Config, fake: FakeRoles) -> dict[str, float]:
        """One evaluation."""
        return asyncio.run(self.evaluator(config, fake).measure())

    def train(
        self,
        config: Config,
        fake: FakeRoles | None = None,
        *,
        ends: type[Exception] | None = None,
        match: str | None = None,
        stop_in: int | None = None,
    ) -> Run:
        """Train in the directory, where ``run.resume`` goes on; stop_in: the step that SIGTERM comes in."""
        fake = fake or FakeRoles()
        output = io.StringIO()
        log = RunLog(
            self.directory, config=config, resolved_yaml="", console=Console(file=output, width=10_000)
        )
        checkpoints = Checkpoints(self.directory / CHECKPOINTS, keep=99)
        prompts = PromptOrder(PROMPTS, seed=config.run.seed, per_step=config.algo.prompts_per_step)
        raised = nullcontext() if ends is None else pytest.raises(ends, match=match)
        with raised, log, StopRequest(60) as stop, stop.deferred():
            human = HumanPairs(
                config, fake.roles(), pairs=self.train_pairs, tokenizer=self.tokenizer, log=log
            )
            if stop_in is not None:

                async def terminate(step: int) -> None:
                    if step == stop_in:
                        signal.raise_signal(signal.SIGTERM)
                        while not stop.requested:
                            await asyncio.sleep(0)

                fake.during = terminate
            evaluator = self.evaluator(config, fake)
            stop.run(train(config, fake.roles(), prompts, human, checkpoints, evaluator, log, stop))
        return Run(self.directory, fake, output.getvalue().splitlines())


@dataclass(frozen=True)
class Run:
    """What a run left behind. messages: what it showed."""

    directory: Path
    fake: FakeRoles
    messages: Sequence[str]

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Rows of its metrics of one kind, without what the machine decides."""
        found = map(json.loads, (self.directory / "metrics.jsonl").read_text().splitlines())
        return [
            {key: value for key, value in row.items() if not key.startswith(MACHINE_PREFIXES)}
            for row in found
            if row["kind"] == kind
        ]

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows("step")]

    @property
    def evaluated(self) -> list[int]:
        return [row["step"] for row in self.rows("eval")]

    @property
    def rollouts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "rollouts.jsonl").read_text().splitlines()]

    @property
    def saved(self) -> list[int]:
        return [step_of(path) for path in Checkpoints(self.directory / CHECKPOINTS, keep=99).committed()]


def small_config() -> Config:
    """Three steps of two shards of two prompts; every second one is evaluated and saved."""
    algo = AlgoConfig(
        steps=3, prompts_per_step=4, prompts_per_shard=2, responses_per_prompt=K, minibatch_prompts=4
    )
    built = Config(algo=algo, reward=RewardConfig(omega_floor=0.6))
    built.evaluate.every = built.checkpoint.every = 2
    built.logging.wandb = WandbMode.disabled
    built.logging.rollouts_per_step = 3
    return built


def rows_of(
    own: Sequence[float],
    frozen: Sequence[float] | None = None,
    *,
    group_size: int,
    gold: Sequence[float] | None = None,
    **tensors: Any,
) -> Rows:
    """Rows with these rewards, two tokens each; other keywords replace fields of `Rows`."""
    count = len(own)
    own_N = torch.tensor(own)
    fields: dict[str, Any] = {
        "group_size": group_size,
        "shard_sizes": (count,),
        "tokens": 4 * count,
        "length_N": torch.full((count,), 2),
        "truncated_N": torch.zeros(count, dtype=torch.bool),
        "finite_N": torch.ones(count, dtype=torch.bool),
        "reward_N": own_N,
        "frozen_reward_N": torch.zeros_like(own_N) if frozen is None else torch.tensor(frozen),
        "response_id_N": torch.arange(count),
        "kl_N": torch.zeros(count),
        "kl_penalty_N": torch.zeros(count),
        "gold": {} if gold is None else {"total": torch.tensor(gold, dtype=torch.float64)},
    }
    return Rows(**{**fields, **tensors})
