"""How text becomes token ids, for the policy and for a reward model with its own tokenizer and template.

A tokenizer with a chat template has it applied; one without reads prompt and response end to end.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def policy_prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids that the policy continues."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    return list(tokenizer(prompt).input_ids)


def policy_response_ids(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of a response as the policy would have written it, the end token included."""
    return [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def conversation_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    """Token ids of prompt and response as a reward model reads them."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return list(tokenizer.apply_chat_template(messages, return_dict=False))
    ids = [*tokenizer(prompt).input_ids, *tokenizer(response, add_special_tokens=False).input_ids]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
