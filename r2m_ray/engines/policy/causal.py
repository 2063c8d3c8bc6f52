"""A causal language model that scores packed rows: log-probs of their response tokens, and hidden states.

Axes: A response tokens, B×L the grid of one forward pass and S = B·L its slots, P policy width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from r2m_ray.engines.policy.blocks import Block, Rows, blocks
from r2m_ray.engines.pretrained import load_pretrained
from r2m_ray.errors import InputError

LOGITS_AT_ONCE = 2**26
"""Logits that exist at a time, roughly; beyond, tokens are scored in chunks that the backward recomputes."""

TRANSFORMED_LOGITS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "logit_scale",
    "logits_scaling",
    "output_multiplier_scale",
    "lm_head_multiplier",
)


class CausalScorer(nn.Module):
    """A causal language model with `label_logprobs` in place of its logits.

    attention: transformers' name of the model's implementation. token_budget: tokens of a forward pass, or
    of one longer row; it also decides in how many chunks they are scored.
    """

    def __init__(
        self, model: PreTrainedModel, *, attention: str, temperature: float, token_budget: int
    ) -> None:
        super().__init__()
        self.model = model
        self._temperature = temperature
        self._token_budget = token_budget
        self._packed = attention.startswith("flash_attention")
        vocabulary, self.width = (int(size) for size in model.get_output_embeddings().weight.shape)
        # As many for every pass: with ZeRO-3 each chunk gathers the head, and all ranks must gather alike.
        self._chunks = math.ceil(token_budget * vocabulary / LOGITS_AT_ONCE)

    def blocks(self, rows: Rows) -> list[Block]:
        """Rows laid out for `forward`: end to end where the model reads them so, else one per line."""
        return blocks(rows, token_budget=self._token_budget, packed=self._packed, device=self.model.device)

    def forward(
        self, input_BL: Tensor, position_BL: Tensor, pick_A: Tensor, label_A: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B·L, P], detached, and the two log-probs [A] of `label_logprobs`.

        Without labels the language-model head does not run.
        """
        output = self.model.base_model(input_ids=input_BL, position_ids=position_BL, use_cache=False)
        state_SP = output.last_hidden_state.flatten(0, 1)
        if not label_A.numel():
            nothing_A = state_SP.new_zeros(0, dtype=torch.float32)
            return state_SP.detach(), nothing_A, nothing_A
        return state_SP.detach(), *self._score(state_SP[pick_A], label_A)

    def _score(self, state_AP: Tensor, label_A: Tensor) -> tuple[Tensor, Tensor]:
        if self._chunks == 1:
            return self._score_chunk(state_AP, label_A)
        parts = (x_A.tensor_split(self._chunks) for x_A in (state_AP, label_A))
        chunks = (
            checkpoint(self._score_chunk, *part, use_reentrant=False) for part in zip(*parts, strict=True)
        )
        tempered_A, unit_A = (torch.cat(scored) for scored in zip(*chunks, strict=True))
        return tempered_A, unit_A

    def _score_chunk(self, state_AP: Tensor, label_A: Tensor) -> tuple[Tensor, Tensor]:
        logits_AV = self.model.get_output_embeddings()(state_AP)
        return label_logprobs(logits_AV, label_A, self._temperature)


def label_logprobs(logits_AV: Tensor, label_A: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`log softmax(logits/temperature)[label]` and, detached, the same at temperature 1; float32 [A] each."""
    logits_AV = logits_AV.float()
    tempered_A = -cross_entropy(logits_AV / temperature, label_A, reduction="none")
    if temperature == 1.0:
        return tempered_A, tempered_A.detach()
    with torch.no_grad():
        unit_A = -cross_entropy(logits_AV, label_A, reduction="none")
    return tempered_A, unit_A


def load_causal(
    model_dir: str, *, field: str, dtype: torch.dtype, attention: str, device: torch.device
) -> PreTrainedModel:
    """Load a causal language model from safetensors, with every dropout at 0: a ratio of two passes over
    the same weights must be 1.

    Raises InputError, naming the config field, where it cannot be loaded or its log-probs are not those of
    its head's logits.
    """
    name = f"{field}={model_dir}"

    def prepare(config: PretrainedConfig) -> None:
        fields = config.get_text_config().to_dict()
        for key in TRANSFORMED_LOGITS:
            if fields.get(key) not in (None, 1, 1.0):
                raise InputError(
                    f"{name}: {key}={fields[key]} in config.json transforms the final logits, which the "
                    "learner does not reproduce; choose a model without it"
                )
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)

    model = load_pretrained(
        AutoModelForCausalLM,
        model_dir,
        field=field,
        kind="causal language model",
        dtype=dtype,
        attention=attention,
        prepare=prepare,
    )
    model.to(device)
    _check_logits(model, name)
    return model


@torch.no_grad()
def _check_logits(model: PreTrainedModel, name: str) -> None:
    """The head applied to the last hidden state must give the model's own, finite logits."""
    probe_BL = torch.arange(8, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    logits = model(input_ids=probe_BL, use_cache=False).logits.float()
    state = model.base_model(input_ids=probe_BL, use_cache=False).last_hidden_state
    if not torch.isfinite(logits).all():
        raise InputError(f"{name}: a probe's logits are not finite; its weight files hold NaN or infinity")
    difference = (model.get_output_embeddings()(state).float() - logits).abs().max()
    if difference > 16 * torch.finfo(model.dtype).eps * (1 + logits.abs().max()):
        raise InputError(
            f"{name}: its logits differ by {float(difference):.3g} from its head applied to its last hidden "
            "state; it transforms them in a way that the learner does not reproduce"
        )
