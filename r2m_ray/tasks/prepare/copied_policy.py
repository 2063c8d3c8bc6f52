"""A policy that is copied instead of trained (``prepare.policy``): is it one, and one of this task?"""

from __future__ import annotations

from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from r2m_ray.engines.model_files import ModelFiles, open_model
from r2m_ray.errors import InputError, Problem, refuse

FIELD = "prepare.policy"
ARCHITECTURE = LlamaForCausalLM.__name__
HELP = "name the `policy` folder of models prepared for this task"


def copied_policy(directory: Path, tokenizer: PreTrainedTokenizerBase, *, positions: int) -> PreTrainedModel:
    """The policy in ``directory``, for prompts and responses of ``positions`` tokens together.

    tokenizer: the task's, which must be the policy's own. Raises InputError with every problem of its files
    before anything is loaded.
    """
    opened = open_model(FIELD, directory)
    refuse([opened] if isinstance(opened, Problem) else [*opened.problems()], f"{FIELD}={directory}")
    assert isinstance(opened, ModelFiles)
    if opened.architecture != ARCHITECTURE:
        raise InputError(f"{FIELD}={directory}: holds {opened.architecture}, no {ARCHITECTURE}; {HELP}")
    if (opened.positions or 0) < positions:
        raise InputError(
            f"{FIELD}={directory}: reads {opened.positions} tokens, and task.max_prompt_tokens and "
            f"task.max_new_tokens are {positions} together; {HELP}, or lower one of them"
        )
    own = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if _spelled(own) != _spelled(tokenizer):
        raise InputError(f"{FIELD}={directory}: its tokenizer is not this task's; {HELP}")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    return model


def require_same_trunk(policy: LlamaConfig, reward: LlamaConfig) -> None:
    """Raise InputError where a reward model cannot start as a copy of the policy, layers above it apart."""
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        ours, theirs = getattr(reward, name), getattr(policy, name)
        if ours != theirs:
            raise InputError(
                f"prepare.reward_from_policy: the reward model's {name} would be {ours}, and the policy's is "
                f"{theirs}; give prepare.reward_width and prepare.reward_heads of the policy"
            )
    if reward.num_hidden_layers < policy.num_hidden_layers:
        raise InputError(
            f"prepare.reward_layers={reward.num_hidden_layers}: the copied policy has "
            f"{policy.num_hidden_layers} layers; use as many or more"
        )


def _spelled(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], str | None]:
    return tokenizer.get_vocab(), tokenizer.chat_template
