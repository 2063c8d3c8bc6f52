"""Responses and labels of note2answer: a stochastic demonstrator, and annotators of its pairs.

The spurious features (courtesy, emphasis, length) are mildly good in what the demonstrator writes, so an
honest reward model learns to like them; biased annotators like them for their own sake.
"""

from __future__ import annotations

import math
from random import Random

from r2m_ray.config.schema import Config, TaskConfig
from r2m_ray.errors import InputError
from r2m_ray.tasks.data import PreferencePair
from r2m_ray.tasks.note2answer.gold import gold
from r2m_ray.tasks.note2answer.world import COURTESY, PROMPT_TOKENS, Fact, Note, source

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


def demonstration(note: Note, task: TaskConfig, random: Random) -> str:
    """What the demonstrator writes for a note: 1 to 6 sentences, slot by slot, with mistakes and mannerisms.

    Args:
        note: says the truth and whom the question is about.
        task: says how often a wrong value is corrected right after it, how many values an attribute has, and
            how long a response may be, its end token included.
        random: where all choices are drawn from.
    """
    words: list[str] = []
    known: list[str] = []
    for slot in range(SLOTS):
        sentence = _sentence(note, known, slot, task, random)
        if not sentence or len(words) + len(sentence) >= task.max_new_tokens:
            break
        words += sentence
    return " ".join(words)


def demonstrations(config: Config, count: int) -> list[tuple[str, str]]:
    """``count`` prompts of the demonstration split, each with one response."""
    _require_room(config.task)
    rows = []
    for index in range(count):
        random = source(config.run.seed, "demonstrations", index)
        note = Note.draw(random, config.task.values_per_attribute)
        rows.append((note.prompt, demonstration(note, config.task, random)))
    return rows


def preference_pairs(config: Config, split: str, count: int) -> tuple[PreferencePair, ...]:
    """``count`` pairs of demonstrations as annotators label them, limited and biased.

    An annotator prefers response a to b with probability ``σ((s_a − s_b) / task.label_temperature)``.
    The score s is gold; with probability ``task.annotator_bias`` it is style alone instead.
    """
    task, pairs = config.task, []
    for index in range(count):
        random, prompt, first, second = _responses(config, split, index)
        score = style if random.random() < task.annotator_bias else _total
        margin = score(prompt, first) - score(prompt, second)
        is_first = random.random() < 1 / (1 + math.exp(min(-margin / task.label_temperature, 700.0)))
        pairs.append(_pair(prompt, first, second, is_first=is_first))
    return tuple(pairs)


def gold_pairs(config: Config, split: str, count: int) -> tuple[PreferencePair, ...]:
    """``count`` pairs of demonstrations, the better one by gold first; none of equal gold."""
    pairs: list[PreferencePair] = []
    index = 0
    while len(pairs) < count:
        _, prompt, first, second = _responses(config, split, index)
        index += 1
        if margin := _total(prompt, first) - _total(prompt, second):
            pairs.append(_pair(prompt, first, second, is_first=margin > 0))
    return tuple(pairs)


def style(prompt: str, text: str) -> float:
    """What a biased annotator sees: ``1.5·courtesies + 0.7·intensifiers + words/12``."""
    score = gold(prompt, text, False)
    return (
        STYLE_WEIGHTS["courtesy"] * score.courtesy
        + STYLE_WEIGHTS["intensifiers"] * score.intensifiers
        + STYLE_WEIGHTS["words"] * len(text.split())
    )


def _total(prompt: str, text: str) -> float:
    return gold(prompt, text, False).total


def _responses(config: Config, split: str, index: int) -> tuple[Random, str, str, str]:
    """The random numbers that a label may use, a prompt, and two different responses to it."""
    task, random = config.task, source(config.run.seed, f"{split} pairs", index)
    _require_room(task)
    note = Note.draw(random, task.values_per_attribute)
    first = second = demonstration(note, task, random)
    while second == first:
        second = demonstration(note, task, random)
    return random, note.prompt, first, second


def _pair(prompt: str, first: str, second: str, *, is_first: bool) -> PreferencePair:
    chosen, rejected = (first, second) if is_first else (second, first)
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected)


def _intensifiers(random: Random) -> int:
    return random.choices(range(len(INTENSIFIERS)), INTENSIFIERS)[0]


def _require_room(task: TaskConfig) -> None:
    """Raise InputError where the limits of length leave no room for a prompt or a sentence."""
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


def _sentence(note: Note, known: list[str], slot: int, task: TaskConfig, random: Random) -> list[str]:
    """The words that fill a slot, none to stop; a correct fact's attribute is added to ``known``."""
    truths = note.truths
    unsaid = [verb for verb in truths if verb not in known]
    logits = dict(CHOICE_LOGITS)
    if not unsaid:
        del logits["correct"]
    if not known:
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
            return _wrong(note, task, random)
        case "off_topic":
            fact = random.choice(note.others)
        case "repeat":
            verb = random.choice(known)
            fact = Fact(note.asked, verb, truths[verb])
        case _:
            verb = random.choice(unsaid)
            known.append(verb)
            fact = Fact(note.asked, verb, truths[verb])
    return fact.words(_intensifiers(random))


def _wrong(note: Note, task: TaskConfig, random: Random) -> list[str]:
    """A wrong fact about the one asked about, corrected or not."""
    if random.random() < MISATTRIBUTED:
        other = random.choice(note.others)
        return Fact(note.asked, other.verb, other.value).words(_intensifiers(random))
    verb, truth = random.choice(list(note.truths.items()))
    lie = Fact(note.asked, verb, truth).made_up(random, task.values_per_attribute)
    intensifiers = _intensifiers(random)
    corrected = truth if random.random() < task.self_correct_prob else None
    return lie.words(intensifiers, corrected=corrected)
