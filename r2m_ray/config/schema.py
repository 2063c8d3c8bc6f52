"""The whole configuration: every field, its meaning and its bounds.

Dataclasses here and in ``config_run`` are the schema; ``conf/*.yaml`` and the command line fill it,
``compose`` reads those, and ``config_checks`` holds every rule about more than one field. Nothing
of this imports torch, so a wrong value is reported within a second of typing the command. vLLM's
and DeepSpeed's own options pass through as dictionaries (``rollout.engine_args``,
``policy.deepspeed``) and are not declared again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from r2m_ray.config.choices import (
    PREPARED,
    Advantage,
    Count,
    Dtype,
    FeedbackRefresh,
    FeedbackSource,
    Fraction,
    KLEstimator,
    KLPlace,
    Natural,
    NonNegative,
    OldLogprobs,
    OmegaSchedule,
    OnAlarm,
    Overlong,
    PairSource,
    Positive,
    Range,
    Ratio,
    RewardScale,
    RewardShape,
    SyncBackend,
    TaskName,
    WandbMode,
    WoInit,
)
from r2m_ray.config.schema_run import (
    CheckpointConfig,
    ClusterConfig,
    EvaluateConfig,
    GuardConfig,
    LoggingConfig,
    MonitorConfig,
    PrepareConfig,
    RunConfig,
    SyncConfig,
    TaskConfig,
)

__all__ = [
    "PREPARED",
    "Advantage",
    "AlgoConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "Dtype",
    "EvaluateConfig",
    "FeedbackConfig",
    "FeedbackRefresh",
    "FeedbackSource",
    "GuardConfig",
    "KLEstimator",
    "KLPlace",
    "LoggingConfig",
    "ModelConfig",
    "MonitorConfig",
    "OldLogprobs",
    "OmegaSchedule",
    "OnAlarm",
    "Overlong",
    "PairSource",
    "PolicyConfig",
    "PrepareConfig",
    "Ratio",
    "ReferenceConfig",
    "RewardConfig",
    "RewardScale",
    "RewardShape",
    "RolloutConfig",
    "RunConfig",
    "SyncBackend",
    "SyncConfig",
    "TaskConfig",
    "TaskName",
    "WandbMode",
    "WoInit",
]


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The pretrained models and the precision they are loaded in."""

    policy: str = PREPARED
    """Hugging Face directory or id of the policy and its tokenizer; ``prepared`` is `r2m-ray prepare`'s."""
    reward: str = PREPARED
    """Hugging Face directory or id of the reward model: sequence classification with one label."""
    reference: str | None = None
    """Directory or id of π_ref; the initial policy when null."""
    dtype: Dtype = Dtype.float32
    """Of the policy, the reference and the rollout engine."""
    reward_dtype: Dtype = Dtype.float32
    """Of the frozen reward trunk; the R2M head is always float32."""
    attention: str = "sdpa"
    """transformers' ``attn_implementation`` of learner, reference and reward trunk."""
    score_layer: str = "score"
    """Attribute path of the reward model's final linear layer, which φ starts as a copy of."""


@dataclass(kw_only=True, slots=True)
class AlgoConfig:
    """One training step: what is sampled, and how the policy learns from it (Eqs. 1–2)."""

    steps: Count = 100
    """T, training steps of the whole run; ω's schedule spans them."""
    prompts_per_step: Count = 16
    """n, prompts sampled in each step."""
    responses_per_prompt: Annotated[int, Range(2)] = 8
    """K, responses sampled for each prompt."""
    prompts_per_shard: Count = 4
    """Prompts of one unit of work; no role splits a shard."""
    advantage: Advantage = Advantage.rloo
    """How the rewards of a group become advantages (Eq. 1)."""
    epochs: Count = 2
    """k, passes over each batch."""
    minibatch_prompts: Count = 8
    """Prompts of one optimizer step of the policy."""
    ratio: Ratio = Ratio.sequence
    """What the importance ratio of Eq. 2 is taken over."""
    clip_low: Annotated[float, Range(0, 1, low_open=True, high_open=True)] = 0.2
    """ε below: the ratio is clipped at 1 − ``clip_low``."""
    clip_high: Positive = 0.2
    """ε above: the ratio is clipped at 1 + ``clip_high``."""
    old_logp: OldLogprobs = OldLogprobs.learner
    """Who scores π_old: one pass of the learner, or the engine that sampled, with truncated correction."""
    importance_cap: Annotated[float, Range(1)] = 2.0
    """Upper bound of the learner/rollout weights when ``old_logp=rollout``."""
    kl_weight: NonNegative = 0.04
    """β, weight of the KL penalty to the reference."""
    kl_estimator: KLEstimator = KLEstimator.k3
    """Estimator of that KL per token."""
    kl_place: KLPlace = KLPlace.loss
    """Whether the penalty is a term of the loss or is subtracted from the reward."""
    temperature: Positive = 1.0
    """Of sampling, and of the log-probs in the ratio."""


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """The vLLM engines that sample."""

    replicas: Count = 1
    """Engines; each samples whole shards."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Passed to vLLM's EngineArgs as they are."""


@dataclass(kw_only=True, slots=True)
class PolicyConfig:
    """The DeepSpeed learner."""

    ranks: Count = 1
    """Data-parallel learner ranks."""
    learning_rate: NonNegative = 3e-4
    """AdamW's learning rate, after the warm-up."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay."""
    warmup_steps: Natural = 0
    """Optimizer steps of linear warm-up."""
    max_grad_norm: Positive = 1.0
    """Global gradient norm above which gradients are scaled down."""
    tokens_per_microbatch: Count = 2048
    """Tokens of one forward pass, padding included."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Passed to ``deepspeed.initialize`` as its config."""


@dataclass(kw_only=True, slots=True)
class ReferenceConfig:
    """The frozen reference policy π_ref."""

    replicas: Count = 1
    """Copies; each shard goes to one of them."""
    tokens_per_microbatch: Count = 4096
    """Tokens of one forward pass, padding included."""


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """The frozen reward trunk with its R2M head, and the head's own training (Eqs. 3–7)."""

    replicas: Count = 1
    """Copies, kept identical; each annotates its shards and contributes their gradients."""
    tokens_per_microbatch: Count = 4096
    """Padded tokens of one trunk forward pass."""
    max_length: Count = 4096
    """Tokens the trunk reads at most; longer inputs are an error."""
    omega_floor: Fraction = 0.6
    """Ω of Eq. 4; 1 means the original reward model throughout (vanilla)."""
    omega_schedule: OmegaSchedule = OmegaSchedule.cosine
    """How ω(t) reaches its floor."""
    update_steps: Natural = 1
    """Optimizer steps of the head in each training step; 0 freezes it."""
    learning_rate: NonNegative = 1e-4
    """AdamW's learning rate of the head."""
    max_grad_norm: Positive = 1.0
    """Gradient norm of the head above which its gradients are scaled down."""
    entropy_weight: Fraction = 0.3
    """α of Eq. 7: 0 is Bradley–Terry alone, 1 is group reward entropy alone."""
    gre_detach_stats: bool = False
    """Whether group reward entropy treats the group's mean and std as constants."""
    pair_source: PairSource = PairSource.annotation
    """Who picks winner and loser of Eq. 5; ``gold`` needs a task that knows it."""
    pair_min_margin: NonNegative = 0.0
    """Pairs whose rewards, those that picked them, differ by less are not learned from."""
    gold_weight: Fraction = 0.0
    """g: advantages are of (1 − g)·r + g·gold, r scaled and shaped; 1 trains the policy on gold, the
    ceiling of every arm. Pairs, metrics and alarms are of the model's own r whatever g is."""
    scale: RewardScale = RewardScale.raw
    """Before advantages; ``match_frozen`` gives a step's rewards the frozen model's spread within groups."""
    shape: RewardShape = RewardShape.raw
    """Of scaled rewards, before gold is mixed in; ``par`` is σ(r − r₀), r₀ the mean reward of the initial
    policy's responses to all of the evaluation's prompts."""
    anchor_fraction: Fraction = 0.0
    """Share of Bradley–Terry in each update that is over the task's own preference pairs, in people's order
    and with h of the current policy, instead of over the groups: as many pairs as a step has prompts."""
    warmup_pairs: Natural = 0
    """Preference pairs of the task to fit the head to before step 1, by Bradley–Terry at ω = Ω with h of the
    initial policy; each is used once, in batches of ``algo.prompts_per_step``."""
    warmup_learning_rate: NonNegative = 1e-3
    """AdamW's learning rate in that warm-up."""
    attention_width: Count = 64
    """d, width of the cross-attention's queries, keys and values."""
    init_std: NonNegative = 0.02
    """Std of the Gaussian that W_q, W_k, W_v and W_o start from."""
    wo_init: WoInit = WoInit.random
    """Start of W_o; ``zero`` makes the first scores those of the original reward model."""


@dataclass(kw_only=True, slots=True)
class FeedbackConfig:
    """h, the policy's hidden states after its final norm, which the reward model reads."""

    source: FeedbackSource = FeedbackSource.rollout
    """Who exports h for the annotation."""
    refresh: FeedbackRefresh = FeedbackRefresh.last_epoch
    """Where h for the reward update comes from (Algorithm 1 line 13)."""
    noise: Fraction = 0.0
    """Share of Gaussian noise with h's own mean and std that replaces h; 1 is the paper's w/ Noise."""


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def uses_feedback(self) -> bool:
        """Whether any step gives the policy's hidden states a weight; otherwise h has width 0."""
        return self.reward.omega_floor < 1.0

    @property
    def uses_human_pairs(self) -> bool:
        """Whether the head is ever fitted to the task's own preference pairs."""
        return self.reward.anchor_fraction > 0 or self.reward.warmup_pairs > 0
