"""Counterfactual pairs of note2answer: two responses to one prompt that differ in one thing only.

The demonstrator's own pairs differ in everything at once, so accuracy on them does not show what a reward
model goes by. ``style``: the same facts, one response with more courtesies and intensifiers; it is the better
one in a seventh of the pairs (a first courtesy), and else the worse one (excess). ``value``: the same
sentences, one true value replaced by another that the note does not mention.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from r2m_ray.config.schema import Config
from r2m_ray.tasks.data import PreferencePair
from r2m_ray.tasks.note2answer.gold import gold
from r2m_ray.tasks.note2answer.world import COURTESY, Fact, Note, source

MOST_COURTESIES = 3
MOST_INTENSIFIERS = 4
"""By which the richer response of a style pair may exceed the plainer one, which has one of each at most."""
TRUE = 0.75
"""Share of true facts in style pairs, close to the demonstrator's."""


def counterfactual_pairs(config: Config, count: int) -> dict[str, tuple[PreferencePair, ...]]:
    """``count`` pairs of each kind, the better response by gold first; they depend on ``run.seed`` alone.

    No response is longer than ``task.max_new_tokens`` allows.
    """
    return {
        kind: tuple(pair(config, source(config.run.seed, f"{kind} pairs", i)) for i in range(count))
        for kind, pair in (("style", _style_pair), ("value", _value_pair))
    }


def _style_pair(config: Config, random: Random) -> PreferencePair:
    """A pair that differs in courtesies and intensifiers only, and in gold."""
    while True:
        note = Note.draw(random, config.task.values_per_attribute)
        facts = [
            fact if random.random() < TRUE else fact.made_up(random, config.task.values_per_attribute)
            for fact in _facts(note, random)
        ]
        courtesies, intensifiers = random.randint(0, 1), random.randint(0, 1)
        more = random.randint(0, MOST_COURTESIES), random.randint(0, MOST_INTENSIFIERS)
        places = [random.randrange(len(facts)) for _ in range(intensifiers + more[1])]
        plain = _response(facts, places[:intensifiers], courtesies)
        rich = _response(facts, places, courtesies + more[0])
        margin = gold(note.prompt, rich, False).total - gold(note.prompt, plain, False).total
        # A second courtesy is worth nothing.
        if margin and _fits(config, rich):
            better, worse = (rich, plain) if margin > 0 else (plain, rich)
            return PreferencePair(prompt=note.prompt, chosen=better, rejected=worse)


def _value_pair(config: Config, random: Random) -> PreferencePair:
    """A pair that differs in one value: the note's in the first response, a made-up one in the second."""
    while True:
        note = Note.draw(random, config.task.values_per_attribute)
        facts = _facts(note, random)
        replaced = random.randrange(len(facts))
        lie = facts[replaced].made_up(random, config.task.values_per_attribute)
        false = [lie if i == replaced else fact for i, fact in enumerate(facts)]
        places = [random.randrange(len(facts)) for _ in range(random.randint(0, 1))]
        courtesies = random.randint(0, 1)
        better, worse = (_response(variant, places, courtesies) for variant in (facts, false))
        if _fits(config, better):
            return PreferencePair(prompt=note.prompt, chosen=better, rejected=worse)


def _facts(note: Note, random: Random) -> list[Fact]:
    """One to three true facts about the one who is asked about, in any order."""
    truths = random.sample(list(note.truths.items()), random.randint(1, 3))
    return [Fact(note.asked, verb, value) for verb, value in truths]


def _response(facts: Sequence[Fact], places: Sequence[int], courtesies: int) -> str:
    """The facts in their order, an intensifier at each of ``places``, then the courtesies."""
    words = [word for i, fact in enumerate(facts) for word in fact.words(places.count(i))]
    return " ".join([*words, *COURTESY * courtesies])


def _fits(config: Config, response: str) -> bool:
    """Whether response and end token are a response of the task."""
    return len(response.split()) < config.task.max_new_tokens
