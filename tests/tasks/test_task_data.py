"""Limits of length, checked when a run's data are loaded: an error by its line, or dropped and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from r2m_ray.config.schema import GOLD_TASKS, Config, Overlong, TaskName
from r2m_ray.errors import InputError
from r2m_ray.tasks.note2answer.world import prompts
from r2m_ray.tasks.prepare.materials import materials
from r2m_ray.tasks.task import gold_scorer, load_task

GOOD = {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4"}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Prompts of at most 3 tokens, responses of at most 3 with their end token."""
    config = Config()
    config.task.name = TaskName.preferences
    config.task.max_prompt_tokens = config.task.max_new_tokens = 3
    for field in ("train_file", "eval_file"):
        setattr(config.task, field, str(tmp_path / f"{field}.jsonl"))
        write(config, field, [GOOD, GOOD | {"prompt": "w5"}])
    return config


def write(config: Config, field: str, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(getattr(config.task, field)).write_text(text)


@pytest.mark.parametrize(
    ("field", "bad", "reason"),
    [
        ("train_file", {"prompt": "w1 w2 w3 w4"}, "prompt over task.max_prompt_tokens=3"),
        ("train_file", {"prompt": " \t"}, "field 'prompt' must be a text that is not empty"),
        ("eval_file", {"prompt": "w1 w2 w3 w4"}, "prompt over task.max_prompt_tokens=3"),
        ("eval_file", {"chosen": "w1 w2 w3"}, "response over task.max_new_tokens=3"),
        ("eval_file", {"rejected": "w1 w2 w3"}, "response over task.max_new_tokens=3"),
        ("eval_file", {"prompt": ""}, "field 'prompt' must be a text that is not empty"),
    ],
)
def test_a_row_over_a_limit_is_found_at_load_by_file_and_line(
    field: str, bad: dict[str, str], reason: str, config: Config, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    load_task(config, tiny_tokenizer)
    write(config, field, [GOOD, GOOD | bad])
    with pytest.raises(InputError) as caught:
        load_task(config, tiny_tokenizer)
    assert str(caught.value).startswith(f"{getattr(config.task, field)}:2: {reason}")


def test_what_is_dropped_is_counted_and_the_counters_add_up(
    config: Config, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config.task.overlong, config.task.skip_bad_rows = Overlong.drop, 1
    bad = [
        {"prompt": "w1 w2 w3 w4"},
        {"chosen": "w1 w2 w3"},
        {"rejected": "w1 w2 w3"},
        {"chosen": "w4"},
        {"prompt": ""},
    ]
    for field in ("train_file", "eval_file"):
        write(config, field, [GOOD, *(GOOD | change for change in bad)])
    task = load_task(config, tiny_tokenizer)
    for counts in task.counts.values():
        dropped = {k: n for k, n in counts.items() if k not in ("rows", "used", "distinct prompts")}
        assert counts["rows"] == 6 == counts["used"] + sum(dropped.values())
    assert task.counts["train prompts"] == {
        "rows": 6,
        "used": 3,
        "bad rows": 1,
        "equal responses": 1,
        "prompt over task.max_prompt_tokens=3": 1,
        "distinct prompts": 1,
    }
    assert task.counts["eval pairs"]["response over task.max_new_tokens=3"] == 2
    assert len(task.eval_pairs) == task.counts["eval pairs"]["used"] == 1


@pytest.mark.parametrize("task", list(TaskName))
def test_the_tasks_that_know_gold_are_the_ones_the_rules_name(task: TaskName, config: Config) -> None:
    config.task.name = task
    scorer = gold_scorer(config)
    assert (scorer is not None) == (task in GOLD_TASKS)
    if scorer:
        row = (prompts(0, "eval", 1, 6)[0], "hope this helps ! red", True)
        # One courtesy, one word that belongs nowhere, no end.
        assert scorer(*row)["total"] == pytest.approx(0.4 - 0.1 - 0.5)


def test_training_pairs_are_kept_within_the_policys_limits_where_they_are_used(
    config: Config, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config.task.overlong = Overlong.drop
    write(config, "train_file", [GOOD, GOOD | {"rejected": "w1 w2 w3"}, GOOD | {"prompt": "w5"}])
    unused = load_task(config, tiny_tokenizer)
    assert unused.train_pairs == ()
    assert "train pairs" not in unused.counts
    config.reward.anchor_fraction = 0.5
    task = load_task(config, tiny_tokenizer)
    assert [(pair.prompt, pair.rejected) for pair in task.train_pairs] == [("w1 w2", "w4"), ("w5", "w4")]
    assert task.counts["train pairs"] == {"rows": 3, "used": 2, "response over task.max_new_tokens=3": 1}
    assert task.train_prompts == unused.train_prompts == ("w1 w2", "w5")


def test_a_warm_up_on_more_pairs_than_there_are_is_refused(
    config: Config, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config.reward.warmup_pairs = 2
    assert len(load_task(config, tiny_tokenizer).train_pairs) == 2
    config.reward.warmup_pairs = 3
    with pytest.raises(InputError, match=r"reward\.warmup_pairs=3 is more than the 2 training pairs"):
        load_task(config, tiny_tokenizer)


def test_note2answers_training_pairs_are_those_that_its_reward_model_is_trained_on(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = Config()
    config.prepare.pair_rows, config.evaluate.pairs, config.reward.anchor_fraction = 20, 20, 1.0
    task = load_task(config, tiny_tokenizer)
    assert task.train_pairs == tuple(materials(config).pairs)
    assert not {pair.prompt for pair in task.train_pairs} & {pair.prompt for pair in task.eval_pairs}
