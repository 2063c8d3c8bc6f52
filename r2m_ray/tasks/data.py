"""Prompts and preference pairs: every row of a source is used or counted with a reason."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from r2m_ray.config.schema import Overlong, TaskConfig
from r2m_ray.core.batch import Prompt, Trajectories, pack_rows
from r2m_ray.engines.text import policy_prompt_ids, policy_response_ids
from r2m_ray.errors import InputError, printable, shown
from r2m_ray.tasks.reader import BadRow, read_rows

REFUSED = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff]")
"""Characters that no text of any language needs: controls but tab and line ends, halves of surrogate pairs,
and the two overrides that show letters in another order than they are read in. The marks, embeddings and
isolates of right-to-left languages stay; whatever is printed is escaped in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """A prompt, and two responses of which an annotator preferred the first."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """The usable pairs of a source, and why the others are not: ``rows == len(pairs) + Σ dropped``.

    places: ``file:line`` of each pair. dropped: rows by reason.
    """

    source: str
    rows: int
    pairs: tuple[PreferencePair, ...]
    places: tuple[str, ...]
    dropped: Mapping[str, int]

    def counts(self) -> dict[str, int]:
        """``rows``, ``used``, and the dropped rows by reason."""
        return {"rows": self.rows, "used": len(self.pairs), **self.dropped}

    def prompts(self) -> tuple[str, ...]:
        """Each distinct prompt once, in order of first appearance."""
        return tuple(dict.fromkeys(pair.prompt for pair in self.pairs))

    def keep(self, reasons: Sequence[str | None]) -> Preferences:
        """The pairs without a reason to drop them; the others are counted by their reason."""
        kept = [n for n, reason in enumerate(reasons) if reason is None]
        dropped = Counter(reason for reason in reasons if reason is not None)
        return replace(
            self,
            pairs=tuple(self.pairs[n] for n in kept),
            places=tuple(self.places[n] for n in kept),
            dropped=dict(Counter(self.dropped) + dropped),
        )


def load_preferences(source: str | None, task: TaskConfig, *, split: str) -> Preferences:
    """Read every pair of a source.

    Pairs whose responses are the same text are dropped and counted, and so are up to ``task.skip_bad_rows``
    rows that are no preference pairs.

    Args:
        source: ``task.train_file`` or ``task.eval_file``.
        task: names the fields, and says how many bad rows may be skipped.
        split: of a `datasets` id that names none.

    Raises:
        InputError: there is no source, or no row in it, or one bad row too many; file, line and field are
            named.
    """
    if not source:
        raise InputError(
            "task.train_file and task.eval_file: task=preferences needs both; give a .jsonl or .parquet "
            "file, or a dataset as org/name:split"
        )
    fields = (task.prompt_field, task.chosen_field, task.rejected_field)
    places: list[str] = []
    pairs: list[PreferencePair] = []
    skipped = 0
    for where, row in read_rows(source, split):
        try:
            pairs.append(_pair(row, fields))
            places.append(where)
        except ValueError as error:
            if skipped == task.skip_bad_rows:
                raise InputError(f"{where}: {error}; {_skipping(skipped)}") from None
            skipped += 1
    if not places and not skipped:
        raise InputError(f"{printable(source)}: no rows; give a file or dataset with preference pairs")
    found = Preferences(
        source=printable(source),
        rows=len(pairs) + skipped,
        pairs=tuple(pairs),
        places=tuple(places),
        dropped={"bad rows": skipped} if skipped else {},
    )
    return found.keep(["equal responses" if pair.chosen == pair.rejected else None for pair in pairs])


def over_limit(
    tokenizer: PreTrainedTokenizerBase, task: TaskConfig, prompt: str, *responses: str
) -> str | None:
    """Which limit of the task a prompt or a response exceeds, in tokens of the policy's; None if none."""
    if len(policy_prompt_ids(tokenizer, prompt)) > task.max_prompt_tokens:
        return f"prompt over task.max_prompt_tokens={task.max_prompt_tokens}"
    if any(len(policy_response_ids(tokenizer, text)) > task.max_new_tokens for text in responses):
        return f"response over task.max_new_tokens={task.max_new_tokens}"
    return None


def sift(found: Preferences, over: Callable[[PreferencePair], str | None], overlong: Overlong) -> Preferences:
    """The pairs within a limit; those over it are an error or dropped and counted, as ``overlong`` says.

    over: which limit a pair exceeds; None if none. Raises InputError where a pair is over the limit and that
    is an error, and where no pair is left.
    """
    reasons = [over(pair) for pair in found.pairs]
    if overlong is Overlong.error:
        for place, pair, reason in zip(found.places, found.pairs, reasons, strict=True):
            if reason:
                raise InputError(
                    f"{place}: {reason}, prompt {shown(pair.prompt)}; raise the limit, or drop and count "
                    "such rows with task.overlong=drop"
                )
    kept = found.keep(reasons)
    if not kept.pairs:
        raise InputError(f"{found.source}: no row is left of {kept.counts()}; raise the limits")
    return kept


def packed_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    pairs_per_shard: int,
    version: int,
) -> list[Trajectories]:
    """Pairs as groups of two rows, chosen first, in shards.

    Args:
        tokenizer: the policy's; rows hold the tokens that the policy would write.
        pairs: in the order of the groups.
        pairs_per_shard: groups of each shard; the last one may have fewer.
        version: of the policy whose hidden states the rows will be read with.
    """
    return [
        pack_rows(
            [pair.prompt for pair in shard],
            [policy_prompt_ids(tokenizer, pair.prompt) for pair in shard],
            [policy_response_ids(tokenizer, text) for pair in shard for text in (pair.chosen, pair.rejected)],
            [text for pair in shard for text in (pair.chosen, pair.rejected)],
            version=version,
        )
        for shard in (pairs[i : i + pairs_per_shard] for i in range(0, len(pairs), pairs_per_shard))
    ]


class PromptOrder:
    """Which prompts a training step samples: a function of seed and step, so there is no cursor to save.

    The order is endless: each pass holds every prompt once, shuffled by the seed. Prompts of one step are
    distinct, also where a pass ends within it: the next pass begins with those that the step has not used.
    (Samples are seeded by step and prompt, so a prompt twice in a step would give the same responses twice.)

    per_step: prompts of each step. Raises InputError where there are fewer prompts than that.
    """

    def __init__(self, prompts: Sequence[str], *, seed: int, per_step: int) -> None:
        if not prompts:
            raise InputError("no prompts to train on; check task.train_file and the task's limits")
        if per_step > len(prompts):
            raise InputError(
                f"algo.prompts_per_step={per_step} is more than the {len(prompts)} distinct prompts of "
                "the task; lower it, or use more data"
            )
        self._prompts = prompts
        self._seed = seed
        self._per_step = per_step
        self._pass = (0, self._shuffled(0, ()))

    def of_step(self, step: int) -> tuple[Prompt, ...]:
        """The prompts of training step 1, 2, …"""
        size, end = len(self._prompts), step * self._per_step
        chosen = [self._order(place // size)[place % size] for place in range(end - self._per_step, end)]
        return tuple(Prompt(index=index, text=self._prompts[index]) for index in chosen)

    def _order(self, turn: int) -> list[int]:
        """The order of one pass; the last one that was asked for is kept."""
        known, order = self._pass if self._pass[0] <= turn else (0, self._shuffled(0, ()))
        while known < turn:
            known += 1
            begun = known * len(self._prompts) % self._per_step
            order = self._shuffled(known, order[len(order) - begun :])
        self._pass = known, order
        return order

    def _shuffled(self, turn: int, used: Sequence[int]) -> list[int]:
        """All prompts in an order of their own, those that the step at hand has used at the end."""
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed} {turn}").shuffle(order)
        late = frozenset(used)
        return [i for i in order if i not in late] + [i for i in order if i in late]


def _pair(row: Any, fields: tuple[str, str, str]) -> PreferencePair:
    """The pair in a row; ValueError with the reason where there is none."""
    if isinstance(row, BadRow):
        raise ValueError(row.reason)
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object with {', '.join(fields)} is needed, not {_described(row)}")
    prompt, chosen, rejected = (_text(row, field) for field in fields)
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected)


def _text(row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        known = shown(", ".join(map(str, row)))
        raise ValueError(
            f"no field {field!r} among {known}; task.prompt_field, task.chosen_field and task.rejected_field "
            "name the fields"
        )
    value = row[field]
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        # A conversation: its last turn is the response.
        value = value[-1].get("content")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {field!r} must be a text that is not empty, not {_described(value)}")
    if refused := REFUSED.search(value):
        raise ValueError(f"field {field!r} has the character {printable(refused.group())}")
    return value


def _described(value: Any) -> str:
    """A value as a message names it; of a nested one only its kind."""
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "white space"}
    return kinds.get(type(value)) or shown(value)


def _skipping(skipped: int) -> str:
    """The remedy for one bad row after ``skipped`` others."""
    if skipped:
        return f"{skipped} bad rows before it were skipped, as many as task.skip_bad_rows allows"
    return "repair it, or skip and count up to N such rows by task.skip_bad_rows=N"
