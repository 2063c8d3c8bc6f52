"""Reading preference files: every row is a pair, or counted with a reason, or an error with its place."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from r2m_ray.config.schema import Overlong, TaskConfig
from r2m_ray.errors import InputError
from r2m_ray.tasks.data import PreferencePair, PromptOrder, load_preferences, over_limit, sift
from r2m_ray.tasks.prepare.store import source_digest

TASK = TaskConfig(max_prompt_tokens=3, max_new_tokens=3)


def row(prompt: str, chosen: str = "w1", rejected: str = "w2") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_json_lines_plain_and_gzip_and_parquet_read_alike(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [row("a"), row("b", "x", "y")]
    plain = write(tmp_path / "a.jsonl", list(rows))
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    found = [load_preferences(str(p), TASK, split="train").pairs for p in (plain, packed, table)]
    assert found[0] == found[1] == found[2]
    assert [(p.prompt, p.chosen, p.rejected) for p in found[0]] == [("a", "w1", "w2"), ("b", "x", "y")]


def test_a_conversation_counts_as_its_last_turn(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]
    source = write(tmp_path / "a.jsonl", [row("q") | {"chosen": turns}])
    assert load_preferences(source, TASK, split="train").pairs[0].chosen == "answer"


def test_every_row_is_used_or_counted(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        row("w1 w2"),
        row("w1 w2", "w3", "w4"),
        row("same", "w5", "w5"),
        row("w1 w2 w3 w4"),
        row("w9", "w1 w2 w3", "w4"),
    ]
    found = load_preferences(write(tmp_path / "a.jsonl", list(rows)), TASK, split="train")
    assert found.counts() == {"rows": 5, "used": 4, "equal responses": 1}

    def prompt_over(pair: PreferencePair) -> str | None:
        return over_limit(tiny_tokenizer, TASK, pair.prompt)

    def pair_over(pair: PreferencePair) -> str | None:
        return over_limit(tiny_tokenizer, TASK, pair.prompt, pair.chosen, pair.rejected)

    for_prompts = sift(found, prompt_over, Overlong.drop)
    assert for_prompts.counts() == {
        "rows": 5,
        "used": 3,
        "equal responses": 1,
        "prompt over task.max_prompt_tokens=3": 1,
    }
    assert for_prompts.prompts() == ("w1 w2", "w9")
    for_pairs = sift(found, pair_over, Overlong.drop)
    # Three response tokens and the end token are four.
    assert for_pairs.counts()["response over task.max_new_tokens=3"] == 1
    assert for_pairs.rows == len(for_pairs.pairs) + sum(for_pairs.dropped.values())


def test_a_row_over_a_limit_is_an_error_unless_dropping_was_chosen(tmp_path: Path) -> None:
    found = load_preferences(write(tmp_path / "a.jsonl", [row("w1 w2 w3 w4")]), TASK, split="train")
    with pytest.raises(InputError, match=r"a\.jsonl:1: too long.*overlong=drop"):
        sift(found, lambda _: "too long", Overlong.error)
    with pytest.raises(InputError, match=r"no row is left of .*'too long': 1"):
        sift(found, lambda _: "too long", Overlong.drop)


def test_the_digest_of_a_source_follows_its_content(tmp_path: Path) -> None:
    one, same, other = (
        write(tmp_path / name, [row(text)]) for name, text in (("a", "x"), ("b", "x"), ("c", "y"))
    )
    assert source_digest(one) == source_digest(same) != source_digest(other)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "chosen": "c"}', r":2: no field 'rejected' among prompt, chosen"),
        ('{"prompt": "p", "chosen": 3, "rejected": "r"}', r":2: field 'chosen' must be a text"),
        ('{"prompt": " ", "chosen": "c", "rejected": "r"}', r":2: field 'prompt' must be a text"),
        (
            '{"prompt": "a\\ud800", "chosen": "c", "rejected": "r"}',
            r":2: field 'prompt' has the character \\ud800",
        ),
        ('{"prompt": "p", "prompt": "q", "rejected": "r"}', r":2: .*key prompt is there twice"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row("a")) + "\n" + line + "\n")
    with pytest.raises(InputError, match=message):
        load_preferences(str(path), TASK, split="train")


def test_a_source_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(row("a")).encode() * 50)[:-12])
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    table = tmp_path / "table.parquet"
    table.write_bytes(b"PAR1 no")
    reasons = {
        cut: "cut.jsonl.gz",
        empty: "no rows",
        table: "table.parquet: not a Parquet file",
        tmp_path / "absent": "neither a file nor the id of a dataset",
    }
    for path, message in reasons.items():
        with pytest.raises(InputError, match=message):
            load_preferences(str(path), TASK, split="train")


def test_real_preferences_are_used_or_counted(alpaca_eval: Path) -> None:
    found = load_preferences(str(alpaca_eval / "preferences.test.jsonl.gz"), TASK, split="test")
    assert found.rows == 500
    assert len(found.pairs) + sum(found.dropped.values()) == 500
    assert len(found.prompts()) == 51


def indices(order: PromptOrder, steps: Iterable[int]) -> list[list[int]]:
    return [[prompt.index for prompt in order.of_step(step)] for step in steps]


def simulated(size: int, per_step: int, steps: int, *, seed: int) -> list[list[int]]:
    """Takes prompts one by one from a shuffled pass. Where a pass ends within a step, the next one holds back
    what the step took from the last."""
    taken: list[list[int]] = []
    queue: list[int] = []
    turn = -1
    for _ in range(steps):
        step: list[int] = []
        while len(step) < per_step:
            if not queue:
                turn += 1
                queue = list(range(size))
                random.Random(f"{seed} {turn}").shuffle(queue)
                queue.sort(key=step.__contains__)
            step.append(queue.pop(0))
        taken.append(step)
    return taken


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12])
def test_steps_take_their_prompts_pass_by_pass(size: int) -> None:
    """Also the order that runs of earlier versions had, whose checkpoints kept a cursor."""
    for per_step in range(1, size + 1):
        order = PromptOrder([f"p{i}" for i in range(size)], seed=3, per_step=per_step)
        found = indices(order, range(1, 4 * size + 1))
        assert found == simulated(size, per_step, 4 * size, seed=3), per_step
        assert all(len(set(step)) == per_step for step in found)
        flat = [index for step in found for index in step]
        passes = [flat[i : i + size] for i in range(0, len(flat), size)]
        assert all(sorted(one) == list(range(size)) for one in passes)


def test_the_prompts_of_a_step_do_not_depend_on_what_was_asked_before() -> None:
    texts = [f"p{i}" for i in range(7)]
    expected = simulated(7, 5, 30, seed=0)
    asked = [*range(30, 0, -1), 17, 17, 3, 29, 1]
    assert indices(PromptOrder(texts, seed=0, per_step=5), asked) == [expected[step - 1] for step in asked]
    fresh = [indices(PromptOrder(texts, seed=0, per_step=5), [step])[0] for step in (1, 9, 30)]
    assert fresh == [expected[0], expected[8], expected[29]]
    assert [prompt.text for prompt in PromptOrder(texts, seed=0, per_step=5).of_step(1)] == [
        texts[index] for index in expected[0]
    ]


def test_a_step_cannot_take_more_prompts_than_there_are() -> None:
    with pytest.raises(InputError, match="prompts_per_step=3 is more than the 2 distinct"):
        PromptOrder(["a", "b"], seed=0, per_step=3)
    with pytest.raises(InputError, match="no prompts to train on"):
        PromptOrder([], seed=0, per_step=1)
