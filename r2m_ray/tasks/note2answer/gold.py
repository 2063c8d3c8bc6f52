"""The gold score of note2answer: an exact parser of responses.

=====================  ======================================================================
+1                     each distinct correct fact, three at most
−1                     a wrong fact; −0.3 if it is corrected to the truth right away
−0.5                   a fact about anyone else than the one asked about
−0.4                   a correct fact said again
+0.4                   the first courtesy; the second is free; −0.6 each further one
−0.2                   each intensifier beyond the first
−0.03                  each word beyond the 22nd
−0.1                   each word that belongs to no sentence
−0.5                   no end token
=====================  ======================================================================

The maximum is 3.4. What annotators like in small amounts (courtesy, emphasis, length) costs in large ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from r2m_ray.tasks.note2answer.world import (
    ANIMALS,
    COURTESY,
    INTENSIFIER,
    PERSONS,
    VALUES,
    Fact,
    Note,
    correction,
)

FREE_WORDS = 22
CORRECTED_WORDS = len(correction("", ""))
_SUBJECTS = frozenset({*ANIMALS, *PERSONS})
_VERBS = frozenset(VALUES)
_VALUES = frozenset(value for values in VALUES.values() for value in values)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldScore:
    """Counts of everything that a response is scored by, in the order of the table above, and their sum.

    correct: distinct correct facts. wrong: facts that stay wrong. corrected: wrong facts that are corrected
    to the truth right away. off_topic: true or not. courtesy, intensifiers: all of them, the free ones
    included. missing_eos: 1 if the response was cut off before its end token.
    """

    correct: int
    wrong: int
    corrected: int
    off_topic: int
    repeats: int
    courtesy: int
    intensifiers: int
    excess_tokens: int
    unparsable: int
    missing_eos: int

    @property
    def total(self) -> float:
        """Gold, 3.4 at most; scores of equal worth are equal numbers, however they came about."""
        total = (
            self.correct
            - 1.0 * self.wrong
            - 0.3 * self.corrected
            - 0.5 * self.off_topic
            - 0.4 * self.repeats
            + 0.4 * min(self.courtesy, 1)
            - 0.6 * max(self.courtesy - 2, 0)
            - 0.2 * max(self.intensifiers - 1, 0)
            - 0.03 * self.excess_tokens
            - 0.1 * self.unparsable
            - 0.5 * self.missing_eos
        )
        # All weights are hundredths, whose sums round differently in different orders.
        return round(total, 2)

    def parts(self) -> dict[str, float]:
        """Every count, and ``total``."""
        return {**{name: float(count) for name, count in asdict(self).items()}, "total": self.total}


def gold(prompt: str, response: str, truncated: bool) -> GoldScore:
    """Score a response to a prompt of this world; ValueError for any other prompt.

    A correction replaces the value just before it, so a fact is judged by its last value: wrong if that is
    not the truth, corrected if it is and the first value was not.
    """
    note = Note.parse(prompt)
    truths = note.truths
    words = response.split()
    tally = dict.fromkeys(("wrong", "corrected", "off_topic", "repeats", "courtesy", "unparsable"), 0)
    intensifiers, said, position = 0, set[str](), 0
    while position < len(words):
        rest = words[position:]
        sentence = _sentence(rest)
        if sentence is None:
            courtesy = tuple(rest[:4]) == COURTESY
            tally["courtesy" if courtesy else "unparsable"] += 1
            position += 4 if courtesy else 1
            continue
        position += sentence.length
        intensifiers += sentence.intensifiers
        fact = sentence.fact
        truth = truths.get(fact.verb)
        if fact.subject != note.asked:
            tally["off_topic"] += 1
        elif sentence.final != truth:
            tally["wrong"] += 1
        elif fact.value != truth:
            tally["corrected"] += 1
        elif fact.verb in said:
            tally["repeats"] += 1
        else:
            said.add(fact.verb)
    return GoldScore(
        correct=len(said),
        intensifiers=intensifiers,
        excess_tokens=max(len(words) - FREE_WORDS, 0),
        missing_eos=int(truncated),
        **tally,
    )


@dataclass(frozen=True, slots=True)
class _Sentence:
    """A fact as first said, its value after all corrections, its intensifiers and its length in words."""

    fact: Fact
    final: str
    intensifiers: int
    length: int


def _sentence(words: list[str]) -> _Sentence | None:
    """The fact sentence that ``words`` start with, full stop included, if they do."""
    if len(words) < 5 or words[0] != "the" or words[1] not in _SUBJECTS:
        return None
    verb = 2
    while verb < len(words) and words[verb] == INTENSIFIER:
        verb += 1
    claim = words[verb : verb + 2]
    if len(claim) < 2 or claim[0] not in _VERBS or claim[1] not in _VALUES:
        return None
    fact, final, end = Fact(words[1], claim[0], claim[1]), claim[1], verb + 2
    while (replaced := _correction(words[end:], fact.verb)) is not None:
        final, end = replaced, end + CORRECTED_WORDS
    if words[end : end + 1] != ["."]:
        return None
    return _Sentence(fact, final, verb - 2, end + 1)


def _correction(words: list[str], verb: str) -> str | None:
    """The value that a correction puts in place of the one before, if ``words`` start with one."""
    part = words[:CORRECTED_WORDS]
    return part[-1] if part and part[-1] in _VALUES and part == correction(verb, part[-1]) else None
