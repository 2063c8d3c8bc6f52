"""The frozen reward model: conversations in, reward token embeddings and original scores out.

Axes: N rows, B rows of a micro-batch, L padded tokens, D reward width.

Any transformers sequence-classification model with one label serves. What its score layer receives
is caught by a forward hook during an ordinary forward pass, so no architecture is known by name.
transformers finds the scored position by comparing token ids with the padding id, which fails where
padding and end token are one; here the position is the last attended token, known from the lengths.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from r2m_ray.engines.policy.blocks import grids
from r2m_ray.engines.pretrained import LOADING_ERRORS, load_pretrained
from r2m_ray.engines.text import conversation_ids
from r2m_ray.errors import InputError

logger = logging.getLogger(__name__)

UNREAD_ID = 0  # Any id inside the vocabulary: padding is never attended to.


class RewardTrunk:
    """A reward model that never changes.

    Args:
        model_dir: a transformers model with one label, and its tokenizer.
        dtype, attention: of the forward pass.
        score_layer: attribute path of the final linear layer.
        max_length: tokens of a conversation at most.
        tokens_per_microbatch: padded tokens of one forward pass.
        device: where it computes.

    Raises:
        InputError: where the model cannot serve as a reward model, naming file, field and remedy.
    """

    def __init__(
        self,
        *,
        model_dir: str,
        dtype: torch.dtype,
        attention: str,
        score_layer: str,
        max_length: int,
        tokens_per_microbatch: int,
        device: torch.device,
    ) -> None:
        self._name = model_dir
        self._tokens_per_microbatch = tokens_per_microbatch
        self._device = device
        model, self.tokenizer = _load(model_dir, dtype, attention)
        self.model = model.to(device).eval().requires_grad_(False)
        score = _score_layer(self.model, score_layer, model_dir)
        self.score_weight_D = score.weight.detach()[0].float()
        self.score_bias = None if score.bias is None else score.bias.detach().float()
        score.register_forward_pre_hook(self._catch)
        self._caught: Tensor | None = None

        text_config = self.model.config.get_text_config()
        self._padding_id: int | None = text_config.pad_token_id
        if self._padding_id is None:
            # transformers refuses batches without one, though the mask already says all; in memory only.
            text_config.pad_token_id = UNREAD_ID
        self._limits = {"reward.max_length": max_length}
        # Absent in models with relative positions only.
        positions: int | None = getattr(text_config, "max_position_embeddings", None)
        if positions is not None:
            self._limits[f"max_position_embeddings in {model_dir}/config.json"] = positions
        self._check_vocabulary()
        self._check_score()

    @property
    def width(self) -> int:
        """D, the width of the reward token embedding."""
        return self.score_weight_D.numel()

    @torch.no_grad()
    def read(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Reward token embedding [N, D] and the model's own score [N] of each conversation, float32.

        The text is rendered by this model's tokenizer and chat template. The same rows in the same order
        give the same bits; another composition of the batch agrees to rounding.
        Raises InputError for a conversation longer than the model or ``reward.max_length`` allows.
        """
        rows = [
            conversation_ids(self.tokenizer, prompt, response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        self._check_rows(rows)
        rte_ND = torch.empty(len(rows), self.width, device=self._device)
        for batch in grids([len(ids) for ids in rows], self._tokens_per_microbatch):
            rte_ND[batch] = self._embed([rows[n] for n in batch])
        return rte_ND, self.score(rte_ND)

    def score(self, rte_ND: Tensor) -> Tensor:
        """The original score layer in float32, [N, D] → [N]."""
        return linear(rte_ND, self.score_weight_D[None], self.score_bias)[:, 0]

    def _embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Input of the score layer at the last attended token of each row, [B, D]."""
        self._forward(rows)
        caught = self._caught
        assert caught is not None
        self._caught = None
        if caught.ndim == 2:
            return caught.float()  # An encoder pools before its classifier.
        last_B = torch.tensor([len(ids) - 1 for ids in rows], device=self._device)
        return caught[torch.arange(len(rows), device=self._device), last_B].float()

    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        ids = [torch.tensor(row, device=self._device) for row in rows]
        mask_BL = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        id_BL = pad_sequence(ids, batch_first=True, padding_value=UNREAD_ID)
        logits: Tensor = self.model(input_ids=id_BL, attention_mask=mask_BL).logits
        return logits

    def _catch(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._caught = args[0]

    def _check_rows(self, rows: Sequence[Sequence[int]]) -> None:
        for n, ids in enumerate(rows):
            if not ids:
                raise InputError(f"reward model {self._name}: row {n} has no tokens, so it cannot be scored")
            for name, limit in self._limits.items():
                if len(ids) > limit:
                    raise InputError(
                        f"reward model {self._name}: the conversation of row {n} has {len(ids)} tokens, and "
                        f"{name} is {limit}; raise that limit or lower task.max_prompt_tokens or "
                        "task.max_new_tokens"
                    )

    def _check_vocabulary(self) -> None:
        embeddings = self.model.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > embeddings:
            raise InputError(
                f"reward model {self._name}: its tokenizer has {len(self.tokenizer)} tokens and its "
                f"embedding {embeddings}; use the tokenizer that the model was trained with"
            )
        ending = conversation_ids(self.tokenizer, "a", "a")[-1:]
        if self._padding_id is not None and ending == [self._padding_id]:
            logger.warning(
                "reward model %s: conversations end with its padding token (id %d); they are scored at that "
                "token, and transformers' own forward pass would score the one before it",
                self._name,
                self._padding_id,
            )

    @torch.no_grad()
    def _check_score(self) -> None:
        """The model's own logit of a probe must be its score layer at the last token, and finite."""
        probe = [i for i in range(9) if i != self._padding_id][:8]
        logit = self._forward([probe]).float()[0, 0]
        rte_ND = self._embed([probe])
        score = self.score(rte_ND)[0]
        if not (torch.isfinite(score) and torch.isfinite(logit)):
            raise InputError(
                f"reward model {self._name}: the score of a probe is {float(score)}; its weight files hold "
                "NaN or infinity, or model.reward_dtype is too narrow"
            )
        rounding = 4 * torch.finfo(self.model.dtype).eps * rte_ND.norm() * self.score_weight_D.norm()
        if abs(score - logit) > rounding + 1e-6:
            raise InputError(
                f"reward model {self._name}: model.score_layer at the last token gives {float(score):.6g}, "
                f"but the model's own logit is {float(logit):.6g}; it pools or transforms its scores in "
                "a way that R2M's head cannot replace"
            )


def _load(
    model_dir: str, dtype: torch.dtype, attention: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name = f"model.reward={model_dir}"

    def prepare(config: PretrainedConfig) -> None:
        if config.num_labels != 1:
            raise InputError(
                f"{name}: num_labels (id2label) in config.json is {config.num_labels}, and a reward model "
                "has 1; use a model trained with num_labels=1"
            )
        config.get_text_config().use_cache = False

    model = load_pretrained(
        AutoModelForSequenceClassification,
        model_dir,
        field="model.reward",
        kind="reward model",
        dtype=dtype,
        attention=attention,
        prepare=prepare,
    )
    try:
        return model, AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise InputError(f"{name}: its tokenizer cannot be loaded: {error}") from error


def _score_layer(model: PreTrainedModel, path: str, model_dir: str) -> nn.Linear:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    candidates = [name for name, module in linears.items() if module.out_features == 1]
    if path not in candidates:
        raise InputError(
            f"model.reward={model_dir} has no linear layer {path!r} with one output; set model.score_layer "
            "to "
            + (f"one of: {', '.join(candidates)}" if candidates else "none: this model has no such layer")
        )
    return linears[path]
