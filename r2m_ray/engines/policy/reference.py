"""The frozen reference policy π_ref."""

from __future__ import annotations

import torch

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import ReferenceKL, ReferenceLogprobs, Trajectories
from r2m_ray.core.policy_loss import row_kl
from r2m_ray.engines.device_loss import raises_device_loss
from r2m_ray.engines.policy.blocks import Rows, blocks, packs_lines
from r2m_ray.engines.policy.causal import CausalScorer, load_causal
from r2m_ray.engines.weights import module_digest


@raises_device_loss("reference policy")
class ReferencePolicy:
    """A causal language model that never changes and scores what the policy sampled.

    Raises InputError, naming ``model.reference``, where it cannot be loaded.
    """

    def __init__(self, *, config: Config, model_dir: str, device: torch.device) -> None:
        model = load_causal(
            model_dir,
            field="model.reference",
            dtype=getattr(torch, config.model.dtype.value),
            attention=config.model.attention,
            device=device,
        )
        self._model = model.eval().requires_grad_(False)
        self._estimator = config.algo.kl_estimator.value
        self._budget = config.reference.tokens_per_microbatch
        self._scorer = CausalScorer(
            model,
            temperature=config.algo.temperature,
            token_budget=self._budget,
        )
        self._packed = packs_lines(config.model.attention)
        self._device = device

    def digest(self) -> str:
        """sha256 of the weights."""
        return module_digest(self._model)

    @torch.no_grad()
    def logprobs(self, trajectories: Trajectories) -> tuple[ReferenceKL, ReferenceLogprobs]:
        """Log-probs of every response token under π_ref, float32 [T], 0 for tokens of the prompt; and the KL
        of each row to it, [N], under the distribution that the row was sampled from.
        """
        tempered_T = torch.zeros(trajectories.layout.tokens)
        unit_T = torch.zeros(trajectories.layout.tokens)
        laid = blocks(
            Rows.of([trajectories]), token_budget=self._budget, packed=self._packed, device=self._device
        )
        for block in laid:
            _, tempered_A, unit_A = self._scorer(
                block.input_BL, block.position_BL, block.pick_A, block.label_A
            )
            action_A = block.action_A.cpu()
            tempered_T[action_A], unit_T[action_A] = tempered_A.cpu(), unit_A.cpu()
        sampled_N, penalty_N = (
            row_kl(
                trajectories.rollout_logp_T,
                tempered_T,
                trajectories.action_T,
                trajectories.layout.offsets,
                estimator,
            )
            for estimator in ("k1", self._estimator)
        )
        kl = ReferenceKL(sampled_N=sampled_N, penalty_N=penalty_N)
        return kl, ReferenceLogprobs(tempered_T=tempered_T, unit_T=unit_T)
