"""Who writes and who judges in note2answer: a stochastic demonstrator, and annotators of its pairs.

The spurious features (courtesy, emphasis, length) are mildly good in what the demonstrator writes, so an
honest reward model learns to like them; biased annotators like them for their own sake.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from r2m_ray.config.schema import Config
from r2m_ray.errors import InputError
from r2m_ray.tasks.data import PreferencePair
from r2m_ray.tasks.note2answer.gold import GoldScore, gold
from r2m_ray.tasks.note2answer.world import COURTESY, PROMPT_TOKENS, VALUES, Fact, Note, source

SLOTS = 6
"""Sentences of a demonstration at most, corrections not counted."""
CHOICE_LOGITS = {"correct": 1.0, "wrong": -0.1, "off_topic": -0.4, "repeat": -1.4, "courtesy": -1.0}
"""What fills a slot: logits of the kinds of sentence that can."""
STOP_LOGITS = (-3.2, 2.0)
"""Logit of stopping at the first and at the last slot, linear in between; the first is always filled."""
MISATTRIBUTED = 0.2
"""Share of the wrong facts that give the one asked about an attribute of the other."""
INTENSIFIERS = (0.78, 0.17, 0.05)
"""Probabilities of 0, 1 and 2 intensifiers in a fact."""
LONGEST_SENTENCE = 13
"""Words of a wrong fact with two intensifiers and its correction."""
STYLE_WEIGHTS = {"courtesy": 1.5, "intensifiers": 0.7, "words": 1 / 12}
"""What a biased annotator likes, and how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstrator:
    """Writes responses slot by slot, with mistakes and mannerisms.

    self_correct_prob: how often a wrong value is corrected right after it.
    values: how many values an attribute has.
    max_words: longest response; the end token is not a word.
    """

    self_correct_prob: float
    values: int
    max_words: int

    def respond(self, note: Note, random: Random) -> str:
        """One response of 1 to 6 sentences."""
        words: list[str] = []
        said: list[str] = []
        for slot in range(SLOTS):
            sentence = self._sentence(note, said, slot, random)
            if not sentence or len(words) + len(sentence) > self.max_words:
                break
            words += sentence
        return " ".join(words)

    def _sentence(self, note: Note, said: list[str], slot: int, random: Random) -> list[str]:
        """The words that fill a slot, none to stop; a correct fact's attribute is added to ``said``."""
        truths = note.truths
        unsaid = [verb for verb in truths if verb not in said]
        logits = dict(CHOICE_LOGITS)
        if not unsaid:
            del logits["correct"]
        if not said:
            del logits["repeat"]
        if slot == 0:
            del logits["courtesy"]
        else:
            first, last = STOP_LOGITS
            logits["stop"] = first + (last - first) * slot / (SLOTS - 1)
        kind = random.choices(list(logits), [math.exp(logit) for logit in logits.values()])[0]
        match kind:
            case "stop":
                return []
            case "courtesy":
                return [*COURTESY]
            case "wrong":
                return self._wrong(note, random)
            case "off_topic":
                fact = random.choice(note.others)
            case "repeat":
                verb = random.choice(said)
                fact = Fact(note.asked, verb, truths[verb])
            case _:
                verb = random.choice(unsaid)
                said.append(verb)
                fact = Fact(note.asked, verb, truths[verb])
        return fact.words(_intensifiers(random))

    def _wrong(self, note: Note, random: Random) -> list[str]:
        if random.random() < MISATTRIBUTED:
            other = random.choice(note.others)
            return Fact(note.asked, other.verb, other.value).words(_intensifiers(random))
        verb, truth = random.choice(list(note.truths.items()))
        value = random.choice([value for value in VALUES[verb][: self.values] if value != truth])
        intensifiers = _intensifiers(random)
        corrected = truth if random.random() < self.self_correct_prob else None
        return Fact(note.asked, verb, value).words(intensifiers, corrected=corrected)


def demonstrator(config: Config) -> Demonstrator:
    """The demonstrator that ``config.task`` describes; InputError where its texts have no room."""
    task = config.task
    if task.max_prompt_tokens < PROMPT_TOKENS:
        raise InputError(
            f"task.max_prompt_tokens={task.max_prompt_tokens}: every prompt of note2answer has "
            f"{PROMPT_TOKENS} tokens; use at least that"
        )
    if task.max_new_tokens <= LONGEST_SENTENCE:
        raise InputError(
            f"task.max_new_tokens={task.max_new_tokens} has no room for a sentence of {LONGEST_SENTENCE} "
            "words and the end token; use 48"
        )
    return Demonstrator(
        self_correct_prob=task.self_correct_prob,
        values=task.values_per_attribute,
        max_words=task.max_new_tokens - 1,
    )


def demonstrations(config: Config, count: int) -> list[tuple[str, str]]:
    """``count`` prompts of the demonstration split, each with one response."""
    writer = demonstrator(config)
    rows = []
    for index in range(count):
        random = source(config.run.seed, "demonstrations", index)
        note = Note.draw(random, config.task.values_per_attribute)
        rows.append((note.prompt, writer.respond(note, random)))
    return rows


def preference_pairs(config: Config, split: str, count: int) -> tuple[PreferencePair, ...]:
    """``count`` pairs of demonstrations as annotators label them, limited and biased.

    An annotator prefers response a to b with probability ``σ((s_a − s_b) / task.label_temperature)``.
    The score s is gold; with probability ``task.annotator_bias`` it is style alone instead.
    """
    task, pairs = config.task, []
    for index in range(count):
        random, first, second = _responses(config, split, index)
        score = style if random.random() < task.annotator_bias else _total
        margin = score(first) - score(second)
        agrees = random.random() < 1 / (1 + math.exp(min(-margin / task.label_temperature, 700.0)))
        pairs.append(_pair(first, second) if agrees else _pair(second, first))
    return tuple(pairs)


def gold_pairs(config: Config, split: str, count: int) -> tuple[PreferencePair, ...]:
    """``count`` pairs of demonstrations, the better one by gold first; none of equal gold."""
    pairs: list[PreferencePair] = []
    index = 0
    while len(pairs) < count:
        _, first, second = _responses(config, split, index)
        index += 1
        if first.score.total != second.score.total:
            better = first.score.total > second.score.total
            pairs.append(_pair(first, second) if better else _pair(second, first))
    return tuple(pairs)


@dataclass(frozen=True, slots=True)
class _Scored:
    prompt: str
    response: str
    score: GoldScore


def style(text: _Scored) -> float:
    """What a biased annotator sees: ``1.5·courtesies + 0.7·intensifiers + words/12``."""
    return (
        STYLE_WEIGHTS["courtesy"] * text.score.courtesy
        + STYLE_WEIGHTS["intensifiers"] * text.score.intensifiers
        + STYLE_WEIGHTS["words"] * len(text.response.split())
    )


def _total(text: _Scored) -> float:
    return text.score.total


def _responses(config: Config, split: str, index: int) -> tuple[Random, _Scored, _Scored]:
    """Two different responses to one prompt, and the random numbers that the label may use."""
    writer, random = demonstrator(config), source(config.run.seed, f"{split} pairs", index)
    note = Note.draw(random, config.task.values_per_attribute)
    first = second = writer.respond(note, random)
    while second == first:
        second = writer.respond(note, random)
    prompt = note.prompt
    return (
        random,
        _Scored(prompt, first, gold(prompt, first, False)),
        _Scored(prompt, second, gold(prompt, second, False)),
    )


def _pair(chosen: _Scored, rejected: _Scored) -> PreferencePair:
    return PreferencePair(prompt=chosen.prompt, chosen=chosen.response, rejected=rejected.response)


def _intensifiers(random: Random) -> int:
    return random.choices(range(len(INTENSIFIERS)), INTENSIFIERS)[0]
