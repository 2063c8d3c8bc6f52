"""The frozen reference policy π_ref."""

from __future__ import annotations

import torch

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import ReferenceKL, ReferenceLogprobs, Trajectories
from r2m_ray.core.policy_loss import row_kl
from r2m_ray.engines.device_loss import raises_device_loss
from r2m_ray.engines.policy.blocks import Rows
from r2m_ray.engines.policy.causal import CausalScorer, load_causal
from r2m_ray.engines.weights import module_digest


@raises_device_loss("reference policy")
class ReferencePolicy:
    """A causal language model that never changes and scores what the policy sampled.

    Args:
        config: of the run.
        model_dir: Hugging Face directory of the reference policy.
        device: where it computes.

    Raises:
        InputError: naming ``model.reference``, where it cannot be loaded.
        DeviceLost: by every method, where its device failed.
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
        self._scorer = CausalScorer(
            model,
            attention=config.model.attention,
            temperature=config.algo.temperature,
            token_budget=config.reference.tokens_per_microbatch,
        )

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
        for block in self._scorer.blocks(Rows.of([trajectories])):
            _, tempered_A, unit_A = self._scorer(
                block.input_BL, block.position_BL, block.pick_A, block.label_A
            )
            action_A = block.action_A.cpu()
            tempered_T[action_A], unit_T[action_A] = tempered_A.cpu(), unit_A.cpu()
        rows = trajectories.rollout_logp_T, tempered_T, trajectories.action_T, trajectories.layout.offsets
        kl = ReferenceKL(sampled_N=row_kl(*rows, "k1"), penalty_N=row_kl(*rows, self._estimator))
        return kl, ReferenceLogprobs(tempered_T=tempered_T, unit_T=unit_T)
