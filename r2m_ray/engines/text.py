"""How text becomes token ids, for the policy and for a reward model with its own tokenizer and template.

A tokenizer with a chat template has it applied; one without reads prompt and response end to end. Special
tokens come from the tokenizer and its template alone: a text that spells one (``</s>``) is read letter by
letter, so neither data nor a response can end a turn or open another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from r2m_ray.errors import InputError, shown

Turn = tuple[str, str]
"""A role of the chat template, and its text."""


def policy_prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids that the policy continues."""
    if tokenizer.chat_template:
        return _rendered_ids(tokenizer, [("user", prompt)], generation=True)
    return _plain_ids(tokenizer, prompt, add_special_tokens=True)


def policy_response_ids(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of a response as the policy would have written it, the end token included."""
    return [*_plain_ids(tokenizer, response), tokenizer.eos_token_id]


def conversation_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    """Token ids of prompt and response as a reward model reads them."""
    if tokenizer.chat_template:
        turns = [("user", prompt), ("assistant", response)]
        return _rendered_ids(tokenizer, turns, generation=False)
    ids = [*_plain_ids(tokenizer, prompt, add_special_tokens=True), *_plain_ids(tokenizer, response)]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _plain_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False
) -> list[int]:
    """Token ids of a text; none is special but those that the tokenizer itself puts around it."""
    encoded = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        split_special_tokens=True,
        return_special_tokens_mask=True,
    )
    forged = _special_ids(tokenizer)
    # A tokenizer that has its special tokens among its words as well finds them there.
    return [
        token
        for token, is_own in zip(encoded.input_ids, encoded.special_tokens_mask, strict=True)
        if is_own or token not in forged
    ]


def _rendered_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, generation: bool
) -> list[int]:
    """Token ids of the chat template filled with the turns; InputError where the template fails.

    Text that forges a special token is encoded apart from the template around it; any other is not, because
    tokens may span the border.
    """
    forged = _special_ids(tokenizer)
    if not any(forged.intersection(tokenizer(text, add_special_tokens=False).input_ids) for _, text in turns):
        return list(_rendered(tokenizer, turns, add_generation_prompt=generation, return_dict=False))
    marks = {f"\ue000{n}\ue001": text for n, (_, text) in enumerate(turns)}
    marked = [(role, mark) for (role, _), mark in zip(turns, marks, strict=True)]
    frame = _rendered(tokenizer, marked, add_generation_prompt=generation, tokenize=False)
    ids: list[int] = []
    for part in re.split(f"({'|'.join(marks)})", frame):
        if part in marks:
            ids += _plain_ids(tokenizer, marks[part])
        else:
            ids += tokenizer(part, add_special_tokens=False).input_ids
    return ids


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], **options: bool) -> Any:
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        # transformers runs templates in a sandbox.
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise InputError(
            f"{tokenizer.name_or_path}: its chat_template does not render a conversation of "
            f"{', '.join(role for role, _ in turns)} ({shown(error)}); repair it in tokenizer_config.json"
        ) from error


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that no text may produce; the one for unknown words is no such id, unless it has another use."""
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return frozenset({*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | others - {None})
