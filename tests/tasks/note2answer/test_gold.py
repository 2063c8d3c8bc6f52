"""Every term of the gold score, by example sentences."""

from __future__ import annotations

import itertools

import pytest

from r2m_ray.tasks.note2answer.gold import GoldScore, gold
from r2m_ray.tasks.note2answer.world import Note

PROMPT = (
    "the fox is red . the girl plays chess . the fox eats corn . the girl owns kites . "
    "the fox roams caves . the girl likes tea . tell me about the fox :"
)
IS, EATS, ROAMS = "the fox is red .", "the fox eats corn .", "the fox roams caves ."
COURTESY = "hope this helps !"


def score(response: str, truncated: bool = False) -> float:
    return gold(PROMPT, response, truncated).total


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", 0.0),
        (IS, 1.0),
        (f"{IS} {EATS} {ROAMS}", 3.0),
        (f"{IS} {EATS} {ROAMS} {COURTESY}", 3.4),
        ("the fox is blue .", -1.0),
        ("the fox is blue sorry , i mean is red .", -0.3),
        ("the fox is blue sorry , i mean is green .", -1.0),
        # Taking back what was right makes it wrong.
        ("the fox is red sorry , i mean is blue .", -1.0),
        ("the fox is blue sorry , i mean is green sorry , i mean is red .", -0.3),
        ("the fox is red sorry , i mean is red .", 1.0),
        # A correction of another attribute, and one that comes after the full stop, belong to no sentence.
        ("the fox is blue sorry , i mean eats corn .", -1.1),
        ("the fox is red . sorry , i mean is blue .", 1.0 - 0.7),
        ("the fox is blue sorry , i mean is red", -1.0),
        # An attribute of the other kind is a wrong fact about the fox.
        ("the fox plays chess .", -1.0),
        ("the girl plays chess .", -0.5),
        ("the girl plays golf .", -0.5),
        (f"{IS} {IS}", 1.0 - 0.4),
        (COURTESY, 0.4),
        (f"{COURTESY} {COURTESY}", 0.4),
        (f"{COURTESY} {COURTESY} {COURTESY}", 0.4 - 0.6),
        ("the fox really is red .", 1.0),
        ("the fox really really is red .", 1.0 - 0.2),
        ("red corn", -0.2),
        ("the fox is red", -0.4),
        ("the fox is chess-like .", -0.5),
    ],
)
def test_each_term_by_hand(response: str, expected: float) -> None:
    assert score(response) == pytest.approx(expected, abs=1e-12)


def test_words_beyond_the_22nd_cost() -> None:
    response = f"{IS} {EATS} {ROAMS} {COURTESY} {COURTESY}"
    assert len(response.split()) == 23
    assert score(response) == pytest.approx(3.4 - 0.03, abs=1e-12)


def test_a_cut_off_response_costs_half_a_fact() -> None:
    assert score(IS, truncated=True) == pytest.approx(0.5, abs=1e-12)


def test_scores_of_equal_worth_are_equal_numbers() -> None:
    names = ("correct", "wrong", "corrected", "off_topic", "repeats", "courtesy", "intensifiers")
    rest = {"excess_tokens": 0, "unparsable": 0, "missing_eos": 0}
    totals = {
        GoldScore(**dict(zip(names, counts, strict=True)), **rest).total
        for counts in itertools.product(range(4), repeat=len(names))
    }
    # Without words in excess all weights are tenths, so two different scores are that far apart.
    assert min(later - earlier for earlier, later in itertools.pairwise(sorted(totals))) > 0.09


def test_parts_add_up_to_the_total() -> None:
    parts = gold(PROMPT, f"{IS} the fox eats nuts . the girl likes tea . {COURTESY} red", True).parts()
    assert {k: v for k, v in parts.items() if v} == {
        "correct": 1.0,
        "wrong": 1.0,
        "off_topic": 1.0,
        "courtesy": 1.0,
        "unparsable": 1.0,
        "missing_eos": 1.0,
        "total": pytest.approx(1 - 1 - 0.5 + 0.4 - 0.1 - 0.5),
    }


def test_the_person_may_be_asked_about_too() -> None:
    prompt = PROMPT.replace("about the fox", "about the girl")
    assert gold(prompt, "the girl owns kites .", False).total == 1.0
    assert gold(prompt, IS, False).total == -0.5


def test_a_text_of_another_world_is_refused() -> None:
    with pytest.raises(ValueError, match="not a note2answer prompt"):
        Note.parse("tell me a joke")
