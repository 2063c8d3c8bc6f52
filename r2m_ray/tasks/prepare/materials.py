"""What prepared models are trained on: tokenizers, demonstrations and pairs; every row is used or counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from r2m_ray.config.schema import Config, TaskName
from r2m_ray.engines.text import conversation_ids
from r2m_ray.tasks.data import PreferencePair, load_preferences, over_limit, sift
from r2m_ray.tasks.note2answer import samples as note2answer_samples
from r2m_ray.tasks.note2answer import world as note2answer

HELD_OUT_PAIRS = 1000
"""note2answer: pairs, ordered by gold, on which a prepared reward model is measured."""
RESPONSE_ONLY = "{{ bos_token }} {{ messages[-1]['content'] }} {{ eos_token }}"
"""Chat template of a reward model that never sees the prompt."""
PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """Everything that a preparation trains on.

    demonstrations: prompt and response. held_out: pairs that measure the reward model.
    counts: for each use of the data its ``rows``, those ``used``, and the others by reason.
    """

    policy_tokenizer: PreTrainedTokenizerBase
    reward_tokenizer: PreTrainedTokenizerBase
    demonstrations: Sequence[tuple[str, str]]
    pairs: Sequence[PreferencePair]
    held_out: Sequence[PreferencePair]
    counts: Mapping[str, Mapping[str, int]]


def materials(config: Config) -> Materials:
    """What a configuration's task trains on, generated or read; InputError for data that cannot serve."""
    match config.task.name:
        case TaskName.note2answer:
            return _note2answer(config)
        case TaskName.preferences:
            return _preferences(config)


def byte_level_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most ``vocabulary`` entries that can spell any text.

    ``<|begin|>`` precedes a text. A text that spells a special token is read letter by letter, so no data can
    forge one.
    """
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    begin = backend.token_to_id(BEGIN)
    backend.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _note2answer(config: Config) -> Materials:
    prepare = config.prepare
    demonstrations = note2answer_samples.demonstrations(config, prepare.sft_rows)
    pairs = note2answer_samples.preference_pairs(config, "train", prepare.pair_rows)
    held_out = note2answer_samples.gold_pairs(config, "held-out", HELD_OUT_PAIRS)
    template = None if config.task.reward_reads_prompt else RESPONSE_ONLY
    uses = {"demonstrations": demonstrations, "pairs": pairs, "held-out pairs": held_out}
    return Materials(
        policy_tokenizer=note2answer.tokenizer(),
        reward_tokenizer=note2answer.tokenizer(template),
        demonstrations=demonstrations,
        pairs=pairs,
        held_out=held_out,
        counts={use: {"rows": len(rows), "used": len(rows)} for use, rows in uses.items()},
    )


def _preferences(config: Config) -> Materials:
    task, limit = config.task, config.reward.max_length
    train = load_preferences(task.train_file, task, split="train")
    held_out = load_preferences(task.eval_file, task, split="test")
    texts = (text for pair in train.pairs for text in (pair.prompt, pair.chosen, pair.rejected))
    tokenizer = byte_level_tokenizer(texts, config.prepare.vocabulary)

    def unread(pair: PreferencePair) -> str | None:
        rows = (conversation_ids(tokenizer, pair.prompt, text) for text in (pair.chosen, pair.rejected))
        return f"over reward.max_length={limit}" if max(map(len, rows)) > limit else None

    written = sift(train, lambda pair: over_limit(tokenizer, task, pair.prompt, pair.chosen), task.overlong)
    read, judged = sift(train, unread, task.overlong), sift(held_out, unread, task.overlong)
    return Materials(
        policy_tokenizer=tokenizer,
        reward_tokenizer=tokenizer,
        demonstrations=[(pair.prompt, pair.chosen) for pair in written.pairs],
        pairs=read.pairs,
        held_out=judged.pairs,
        counts={
            "demonstrations": written.counts(),
            "pairs": read.counts(),
            "held-out pairs": judged.counts(),
        },
    )
