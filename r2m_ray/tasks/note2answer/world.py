"""note2answer: a world in which every truth is known, small enough for two CPU cores.

A prompt is a note of six facts about an animal and a person, followed by a question about one of them::

    the fox is red . the girl plays chess . … tell me about the fox :

The two kinds have different attributes, so an attribute alone finds its fact: a tiny model need not
bind entities in context. A response is made of facts, courtesies, intensifiers and self-corrections;
``gold.py`` scores it exactly, ``samples.py`` writes the demonstrations.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ANIMALS = _words("fox owl bear wolf deer hare mole otter badger lynx heron toad seal")
PERSONS = _words("girl boy baker nurse pilot farmer teacher sailor singer painter doctor king queen judge")
ANIMAL_VALUES = {
    "is": _words(
        "red blue green yellow orange purple pink brown black white grey golden silver crimson teal violet "
        "beige scarlet"
    ),
    "roams": _words(
        "caves forests deserts meadows swamps hills beaches islands valleys cliffs gardens orchards marshes "
        "ponds rivers jungles plains canyons"
    ),
    "eats": _words(
        "corn berries nuts seeds leaves worms fish grass roots clover beetles snails mushrooms apples acorns "
        "honey wheat plums"
    ),
}
PERSON_VALUES = {
    "plays": _words(
        "chess tennis golf cricket football hockey rugby darts bingo dominoes checkers poker bridge drums "
        "violin piano guitar flute"
    ),
    "owns": _words(
        "kites boats bikes clocks lamps hats scarves ropes maps coins stamps bells masks mirrors ladders "
        "baskets wagons candles"
    ),
    "likes": _words(
        "tea coffee milk juice soup bread cheese cake pie jam rice pasta salad butter cocoa lemonade toast "
        "pudding"
    ),
}
VALUES = ANIMAL_VALUES | PERSON_VALUES
"""Values of each attribute; an attribute is named by its verb."""
INTENSIFIER = "really"
COURTESY = ("hope", "this", "helps", "!")
CORRECTION = ("sorry", ",", "i", "mean")
QUESTION = ("tell", "me", "about", "the")
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
PROMPT_TOKENS = 37
"""Tokens of every prompt, the beginning-of-text token included."""


@dataclass(frozen=True, slots=True)
class Fact:
    """``the <subject> <verb> <value> .``"""

    subject: str
    verb: str
    value: str

    def words(self, intensifiers: int = 0, *, corrected: str | None = None) -> list[str]:
        """The sentence; ``corrected`` is a value that replaces the one just said."""
        said = ["the", self.subject, *[INTENSIFIER] * intensifiers, self.verb, self.value]
        return [*said, *(correction(self.verb, corrected) if corrected else ()), "."]

    def made_up(self, random: Random, values: int) -> Fact:
        """The fact with another value of its attribute's first ``values``."""
        others = [value for value in VALUES[self.verb][:values] if value != self.value]
        return Fact(self.subject, self.verb, random.choice(others))


def correction(verb: str, value: str) -> list[str]:
    """The words that replace the value just said, before the full stop: ``sorry , i mean <verb> <value>``.

    The verb is said again because a tiny model finds a value by the verb before it: without it, the policy
    looked up 87 % of all values after 800 steps of training, with it 96 %. The correction begins at the value
    because there a tiny model can compare it with the note, one look away; after a full stop it never learned
    to: ``sorry`` was as likely after a true fact as after a wrong one, after 5000 steps.
    """
    return [*CORRECTION, verb, value]


@dataclass(frozen=True, slots=True)
class Note:
    """What a prompt says and asks: six facts in their order, and whom the question is about."""

    facts: tuple[Fact, ...]
    asked: str

    @classmethod
    def draw(cls, random: Random, values: int) -> Note:
        """A note about a random animal and a random person, who are asked about equally often.

        values: how many of each attribute's values this world uses, from the first on.
        """
        animal, person = random.choice(ANIMALS), random.choice(PERSONS)
        facts = [
            Fact(subject, verb, random.choice(choices[:values]))
            for subject, attributes in ((animal, ANIMAL_VALUES), (person, PERSON_VALUES))
            for verb, choices in attributes.items()
        ]
        random.shuffle(facts)
        return cls(facts=tuple(facts), asked=random.choice((animal, person)))

    @classmethod
    def parse(cls, prompt: str) -> Note:
        """The note in a prompt; ValueError for a text that is not a prompt of this world."""
        words = prompt.split()
        body, question = words[:-6], words[-6:]
        sentences = [body[i : i + 5] for i in range(0, len(body), 5)]
        facts = tuple(Fact(s[1], s[2], s[3]) for s in sentences if len(s) == 5)
        note = cls(facts=facts, asked=question[4] if len(question) == 6 else "")
        if note.prompt != " ".join(words) or not note.truths:
            raise ValueError(f"not a note2answer prompt: {prompt[:120]!r}")
        return note

    @property
    def prompt(self) -> str:
        words = [word for fact in self.facts for word in fact.words()]
        return " ".join([*words, *QUESTION, self.asked, ":"])

    @property
    def truths(self) -> dict[str, str]:
        """Value of each attribute of the one who is asked about."""
        return {fact.verb: fact.value for fact in self.facts if fact.subject == self.asked}

    @property
    def others(self) -> tuple[Fact, ...]:
        """Facts about the other one."""
        return tuple(fact for fact in self.facts if fact.subject != self.asked)


def source(seed: int, split: str, index: int) -> Random:
    """The random numbers of one item of one split; they depend on nothing else, on any machine."""
    return Random(f"note2answer {seed} {split} {index}")


def prompts(seed: int, split: str, count: int, values: int) -> tuple[str, ...]:
    """``count`` prompts of a split in a world of so many ``values`` of each attribute."""
    return tuple(Note.draw(source(seed, split, index), values).prompt for index in range(count))


def vocabulary() -> list[str]:
    """Every token of the world, special ones first; the position is the token's id."""
    values = [value for choices in VALUES.values() for value in choices]
    structure = dict.fromkeys([*QUESTION, ":", ".", *VALUES, INTENSIFIER, *COURTESY, *CORRECTION])
    return [*SPECIALS, *structure, *ANIMALS, *PERSONS, *values]


def tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per word; a text is given ``<bos>`` in front and no end, so that it can be continued."""
    words = {word: i for i, word in enumerate(vocabulary())}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", words["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=chat_template,
    )
