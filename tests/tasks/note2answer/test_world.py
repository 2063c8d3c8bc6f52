"""The world and its samplers: repeatable byte for byte, with the statistics that the knobs ask for."""

from __future__ import annotations

import math

import pytest

from r2m_ray.config.schema import Config
from r2m_ray.tasks.note2answer.gold import gold
from r2m_ray.tasks.note2answer.samples import (
    demonstration,
    demonstrations,
    gold_pairs,
    preference_pairs,
)
from r2m_ray.tasks.note2answer.world import (
    PROMPT_TOKENS,
    VALUES,
    Note,
    prompts,
    source,
    tokenizer,
    vocabulary,
)

MANY = 2000


def config(**task: float | bool) -> Config:
    built = Config()
    for field, value in task.items():
        setattr(built.task, field, value)
    return built


def total(prompt: str, response: str) -> float:
    return gold(prompt, response, False).total


def test_the_same_seed_gives_the_same_world() -> None:
    assert prompts(3, "train", 50, 6) == prompts(3, "train", 50, 6)
    assert demonstrations(config(), 50) == demonstrations(config(), 50)
    assert preference_pairs(config(), "train", 20) == preference_pairs(config(), "train", 20)


def test_seeds_and_splits_share_no_prompt() -> None:
    worlds = [set(prompts(seed, split, 200, 6)) for seed in (0, 1) for split in ("train", "eval")]
    assert len(set.union(*worlds)) == sum(map(len, worlds))


def test_a_prompt_reads_back_as_its_note() -> None:
    for prompt in prompts(0, "train", 100, 18):
        note = Note.parse(prompt)
        assert note.prompt == prompt
        assert len(note.truths) == 3
        assert len(note.others) == 3


@pytest.mark.parametrize("values", [2, 6, 18])
def test_a_world_uses_as_many_values_of_each_attribute_as_asked(values: int) -> None:
    seen = {fact for prompt in prompts(0, "train", 1500, values) for fact in Note.parse(prompt).facts}
    wrong = {
        value
        for _, response in demonstrations(config(values_per_attribute=values), MANY)
        for value in response.split()
    } & {value for choices in VALUES.values() for value in choices}
    for verb, choices in VALUES.items():
        assert {fact.value for fact in seen if fact.verb == verb} == set(choices[:values])
        assert wrong & set(choices) == set(choices[:values])


def test_every_word_of_the_world_is_one_token() -> None:
    made = tokenizer()
    assert len(vocabulary()) == len(set(vocabulary())) == len(made)
    texts = list(prompts(0, "train", 100, 18))
    assert {len(ids) for ids in made(texts).input_ids} == {PROMPT_TOKENS}
    unknown = made.unk_token_id
    for prompt, response in demonstrations(config(), 100):
        assert unknown not in made(prompt).input_ids
        assert unknown not in made(response).input_ids


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.6])
def test_wrong_facts_are_corrected_as_often_as_asked(probability: float) -> None:
    task = config(self_correct_prob=probability).task
    scores = []
    for i in range(MANY):
        random = source(0, "test", i)
        note = Note.draw(random, 6)
        scores.append(gold(note.prompt, demonstration(note, task, random), False))
    corrected, wrong = sum(s.corrected for s in scores), sum(s.wrong for s in scores)
    # A misattribution, a fifth of the wrong facts, is never corrected.
    expected = 0.8 * probability
    spread = math.sqrt(0.25 / (corrected + wrong))
    assert corrected / (corrected + wrong) == pytest.approx(expected, abs=5 * spread)


def test_demonstrations_are_good_but_not_perfect() -> None:
    scores = [total(*row) for row in demonstrations(config(), MANY)]
    lengths = [len(response.split()) for _, response in demonstrations(config(), MANY)]
    assert 0.8 < sum(scores) / MANY < 1.6
    assert 19 < sum(lengths) / MANY < 26
    assert max(lengths) <= config().task.max_new_tokens - 1


def test_a_cold_unbiased_annotator_follows_gold() -> None:
    pairs = preference_pairs(config(annotator_bias=0.0, label_temperature=1e-6), "train", 300)
    differences = [total(p.prompt, p.chosen) - total(p.prompt, p.rejected) for p in pairs]
    # Sums of tenths round.
    assert min(differences) > -1e-9


def test_bias_and_temperature_make_labels_disagree_with_gold() -> None:
    def agreement(bias: float, temperature: float) -> float:
        built = config(annotator_bias=bias, label_temperature=temperature)
        pairs = preference_pairs(built, "train", 1000)
        differences = [total(p.prompt, p.chosen) - total(p.prompt, p.rejected) for p in pairs]
        decided = [d for d in differences if d]
        return sum(d > 0 for d in decided) / len(decided)

    clean, warm, biased = agreement(0.0, 0.01), agreement(0.0, 1.5), agreement(1.0, 0.01)
    assert clean > 0.98
    assert biased < warm < clean
    assert 0.6 < warm < 0.9


def test_gold_pairs_are_ordered_by_gold() -> None:
    pairs = gold_pairs(config(), "held-out", 200)
    assert all(total(p.prompt, p.chosen) > total(p.prompt, p.rejected) for p in pairs)
