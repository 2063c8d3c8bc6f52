"""Prompts and preference pairs: read row by row, every row used or counted with a reason.

A source is a JSONL or Parquet file, plain or gzip, or the id of a `datasets` dataset, which may name its
split: ``org/name:train_prefs``.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from r2m_ray.config import Overlong, TaskConfig
from r2m_ray.errors import InputError
from r2m_ray.models.text import policy_prompt_ids, policy_response_ids
from r2m_ray.problems import shown
from r2m_ray.roles import Prompt

MAX_LINE_BYTES = 16 * 2**20
"""A longer line is taken for a damaged file, so memory stays bounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """A prompt, and two responses of which an annotator preferred the first."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """The usable pairs of a source, and why the other rows are not: ``rows == len(pairs) + Σ dropped``."""

    source: str
    rows: int
    pairs: tuple[PreferencePair, ...]
    dropped: Mapping[str, int]

    def counts(self) -> dict[str, int]:
        """``rows``, ``used``, and the dropped rows by reason."""
        return {"rows": self.rows, "used": len(self.pairs), **self.dropped}

    def prompts(self) -> tuple[str, ...]:
        """Each distinct prompt once, in order of first appearance."""
        return tuple(dict.fromkeys(pair.prompt for pair in self.pairs))

    def keep(self, reasons: Sequence[str | None]) -> Preferences:
        """Drop each pair that has a reason to be dropped."""
        kept = tuple(p for p, reason in zip(self.pairs, reasons, strict=True) if reason is None)
        dropped = Counter(reason for reason in reasons if reason is not None)
        return replace(self, pairs=kept, dropped=dict(Counter(self.dropped) + dropped))


def load_preferences(source: str, task: TaskConfig, *, split: str) -> Preferences:
    """Read every pair of a source.

    split: of a `datasets` id that names none. Pairs whose responses are the same text are dropped and
    counted. Raises InputError naming file, line and field of a row that is not a preference pair.
    """
    fields = (task.prompt_field, task.chosen_field, task.rejected_field)
    pairs = [_pair(where, row, fields) for where, row in _rows(source, split)]
    if not pairs:
        raise InputError(f"{source}: no rows; give a file or dataset with preference pairs")
    found = Preferences(source=source, rows=len(pairs), pairs=tuple(pairs), dropped={})
    return found.keep(["equal responses" if pair.chosen == pair.rejected else None for pair in pairs])


def over_limit(
    tokenizer: PreTrainedTokenizerBase, task: TaskConfig, prompt: str, responses: Iterable[str]
) -> str | None:
    """Which limit of the task a prompt or a response exceeds, in the policy's tokens; None if none."""
    if len(policy_prompt_ids(tokenizer, prompt)) > task.max_prompt_tokens:
        return f"prompt over task.max_prompt_tokens={task.max_prompt_tokens}"
    if any(len(policy_response_ids(tokenizer, text)) > task.max_new_tokens for text in responses):
        return f"response over task.max_new_tokens={task.max_new_tokens}"
    return None


def sift(found: Preferences, over: Callable[[PreferencePair], str | None], overlong: Overlong) -> Preferences:
    """Treat each pair that is ``over`` a limit as ``overlong`` says: an error, or dropped and counted.

    Raises InputError too if no pair is left.
    """
    reasons = [over(pair) for pair in found.pairs]
    if overlong is Overlong.error:
        for pair, reason in zip(found.pairs, reasons, strict=True):
            if reason:
                raise InputError(
                    f"{found.source}: {reason}, prompt {shown(pair.prompt)}; raise the limit, or drop and "
                    "count such rows with task.overlong=drop"
                )
    kept = found.keep(reasons)
    if not kept.pairs:
        raise InputError(f"{found.source}: no row is left of {kept.counts()}; raise the limits")
    return kept


class PromptStream:
    """Endless prompts, shuffled anew in each pass by a seed; its cursor can be saved and restored."""

    def __init__(self, prompts: Sequence[str], *, seed: int) -> None:
        if not prompts:
            raise InputError("no prompts to train on; check task.train_file and the task's limits")
        self._prompts = prompts
        self._seed = seed
        self._position = 0
        self._pass = -1
        self._order: list[int] = []

    def take(self, count: int) -> tuple[Prompt, ...]:
        """The next prompts; a pass that ends is followed by the next one."""
        return tuple(self._next() for _ in range(count))

    def state(self) -> dict[str, int]:
        return {"position": self._position, "prompts": len(self._prompts), "seed": self._seed}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken. Raises InputError where it was taken of other data."""
        expected = {"prompts": len(self._prompts), "seed": self._seed}
        if {key: state[key] for key in expected} != expected:
            raise InputError(
                f"the checkpoint's data cursor {dict(state)} belongs to other data or another seed than "
                f"{expected}; resume with the task and run.seed of the saved run"
            )
        self._position = state["position"]

    def _next(self) -> Prompt:
        turn, place = divmod(self._position, len(self._prompts))
        if turn != self._pass:
            self._order = list(range(len(self._prompts)))
            random.Random(f"{self._seed} {turn}").shuffle(self._order)
            self._pass = turn
        self._position += 1
        index = self._order[place]
        return Prompt(index=index, text=self._prompts[index])


def _rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """Each row of a source with a name for the place it stands at."""
    path = Path(source)
    if not path.exists():
        yield from _dataset(source, split)
    elif path.name.removesuffix(".gz").endswith(".parquet"):
        yield from _table(path)
    else:
        yield from _json_lines(path)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as stream:
            while line := stream.readline(MAX_LINE_BYTES):
                number += 1
                where = f"{path}:{number}"
                if len(line) == MAX_LINE_BYTES:
                    raise InputError(f"{where}: a line of more than {MAX_LINE_BYTES >> 20} MiB is not a pair")
                if line.strip():
                    yield where, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (OSError, EOFError) as error:
        raise InputError(f"{path}:{number + 1}: cannot be read ({error}); give a readable file") from error
    except ValueError as error:
        raise InputError(f"{path}:{number}: not a line of JSON in UTF-8 ({error})") from error


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with (
            gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream,
            parquet.ParquetFile(stream) as table,
        ):
            rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows))
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a Parquet file that can be read ({error})") from error


def _dataset(source: str, split: str) -> Iterable[tuple[str, Any]]:
    import datasets

    name, _, named_split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=named_split or split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{source}: neither a file nor a dataset that can be loaded ({error}); "
            "give a .jsonl or .parquet path, or org/name:split"
        ) from error
    return ((f"{source}: row {i}", row) for i, row in enumerate(rows))


def _pair(where: str, row: Any, fields: tuple[str, str, str]) -> PreferencePair:
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON object with {', '.join(fields)} is needed, not {shown(row)}")
    prompt, chosen, rejected = (_text(where, row, field) for field in fields)
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected)


def _text(where: str, row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        known = ", ".join(map(str, row))
        raise InputError(f"{where}: no field {field!r} among {known}; set task.prompt_field and its kin")
    value = row[field]
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        # A conversation: its last turn is the response.
        value = value[-1].get("content")
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: field {field!r} must be a text that is not empty, not {shown(value)}")
    return value
