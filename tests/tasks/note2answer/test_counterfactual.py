"""Counterfactual pairs: what they share, the one thing they differ in, and their gold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from r2m_ray.config.schema import Config
from r2m_ray.tasks.data import PreferencePair
from r2m_ray.tasks.note2answer.counterfactual import counterfactual_pairs
from r2m_ray.tasks.note2answer.gold import GoldScore, gold
from r2m_ray.tasks.note2answer.world import COURTESY, INTENSIFIER, VALUES, Note, tokenizer
from r2m_ray.tasks.task import load_task

MANY = 1000
Pairs = Mapping[str, Sequence[PreferencePair]]


@pytest.fixture(scope="module")
def many() -> Pairs:
    return counterfactual_pairs(Config(), MANY)


def scores(pair: PreferencePair) -> tuple[GoldScore, GoldScore]:
    return gold(pair.prompt, pair.chosen, False), gold(pair.prompt, pair.rejected, False)


def facts(response: str) -> list[str]:
    """The words that are no style."""
    plain = response.replace(" ".join(COURTESY), "")
    return [word for word in plain.split() if word != INTENSIFIER]


def test_style_pairs_say_the_same_and_the_better_style_comes_first(many: Pairs) -> None:
    for pair in many["style"]:
        better, worse = scores(pair)
        assert facts(pair.chosen) == facts(pair.rejected)
        assert (better.correct, better.wrong) == (worse.correct, worse.wrong)
        assert better.total - worse.total > 0.02
        more = better.courtesy - worse.courtesy, better.intensifiers - worse.intensifiers
        # One of the two has at least as much of everything.
        assert more != (0, 0)
        assert max(more) <= 0 or min(more) >= 0


def test_more_style_is_the_better_one_in_a_seventh_of_the_pairs(many: Pairs) -> None:
    richer = [len(p.chosen.split()) > len(p.rejected.split()) for p in many["style"]]
    assert 0.1 < sum(richer) / MANY < 0.18


def test_style_pairs_have_true_and_false_facts(many: Pairs) -> None:
    found = [scores(pair)[0] for pair in many["style"]]
    correct, wrong = sum(s.correct for s in found), sum(s.wrong for s in found)
    # 2,000 facts: five standard deviations of a share of .75 are .05.
    assert correct / (correct + wrong) == pytest.approx(0.75, abs=0.05)


def test_value_pairs_differ_in_one_value_that_the_note_does_not_hold(many: Pairs) -> None:
    for pair in many["value"]:
        chosen, rejected = pair.chosen.split(), pair.rejected.split()
        ((truth, lie),) = [(a, b) for a, b in zip(chosen, rejected, strict=True) if a != b]
        assert lie not in pair.prompt.split()
        assert Note.parse(pair.prompt).truths[chosen[chosen.index(truth) - 1]] == truth
        assert any(truth in values and lie in values for values in VALUES.values())
        better, worse = scores(pair)
        assert (better.wrong, worse.wrong, better.correct - worse.correct) == (0, 1, 1)
        assert better.total - worse.total == pytest.approx(2.0, abs=1e-12)


def test_every_word_of_them_belongs_to_a_sentence(many: Pairs) -> None:
    for pairs in many.values():
        assert all(score.unparsable == score.off_topic == 0 for pair in pairs for score in scores(pair))


def test_pairs_depend_on_the_seed_and_on_nothing_else() -> None:
    config = Config()
    found = counterfactual_pairs(config, 50)
    assert {kind: len(set(pairs)) for kind, pairs in found.items()} == {"style": 50, "value": 50}
    assert {kind: pairs[:20] for kind, pairs in found.items()} == counterfactual_pairs(config, 20)
    other = Config()
    other.run.seed = 1
    elsewhere = counterfactual_pairs(other, 50)
    assert not {pair.prompt for pair in found["style"]} & {pair.prompt for pair in elsewhere["style"]}
    other.run.seed, other.task.annotator_bias = 0, 1.0
    assert counterfactual_pairs(other, 50) == found


@pytest.mark.parametrize("tokens", [15, 24, 48])
def test_responses_leave_room_for_the_end_token(tokens: int) -> None:
    config = Config()
    config.task.max_new_tokens = tokens
    for pairs in counterfactual_pairs(config, 100).values():
        assert max(len(text.split()) for pair in pairs for text in (pair.chosen, pair.rejected)) < tokens


def test_the_task_has_half_as_many_of_each_kind_as_held_out_pairs() -> None:
    config = Config()
    config.evaluate.pairs = 14
    assert load_task(config, tokenizer()).counterfactual_pairs == counterfactual_pairs(config, 7)
    config.evaluate.pairs = 0
    assert load_task(config, tokenizer()).counterfactual_pairs == {"style": (), "value": ()}
