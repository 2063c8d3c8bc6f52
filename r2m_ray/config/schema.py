"""The configuration: every field once, with its type and range, its sentence, and what it decides.

A field's annotation carries its range and, where they are not the usual ones, three answers: whether a
resumed run may change it (`Resume`), whether prepared models depend on it (`Prepares`), and whether runs that
differ in it may be compared (`Compare`). An answer on a section holds for each of its fields that gives none.
``fields`` reads them; resume, prepare and compare take their lists from there. Options of vLLM and DeepSpeed
pass through as mappings and are not declared again.
"""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

PREPARED = "prepared"
"""Value of ``model.policy`` and ``model.reward`` that means: what `r2m-ray prepare` made for this config."""


class Resume(StrEnum):
    """Whether a resumed run may change a field; ``never`` is usual."""

    never = "never changes in a run"
    reshard = "may change on resume with run.reshard=true"
    free = "may change on resume"
    content = "its files may move, not change, on resume"


class Prepares(StrEnum):
    """Whether prepared models depend on a field: ``never`` is usual, ``content`` is that of the files."""

    never = "prepared models do not depend on it"
    always = "prepared models depend on it"
    note2answer = "prepared models of note2answer depend on it"
    preferences = "prepared models of preferences depend on it"
    content = "prepared models depend on the files"


class Compare(StrEnum):
    """In which runs of one comparison a field must agree; ``never`` is usual."""

    never = "compared runs may differ in it"
    always = "equal in all compared runs"
    seed = "equal in compared runs of one seed"
    arm = "equal in compared runs of one arm"


TaskName = StrEnum("TaskName", "note2answer preferences")
GOLD_TASKS = (TaskName.note2answer,)
Dtype = StrEnum("Dtype", "float32 bfloat16")
Advantage = StrEnum("Advantage", "rloo grpo dr_grpo reinforce_pp remax")
Ratio = StrEnum("Ratio", "sequence token geometric")
OldLogprobs = StrEnum("OldLogprobs", "learner rollout")
KLEstimator = StrEnum("KLEstimator", "k1 k2 k3")
KLPlace = StrEnum("KLPlace", "loss reward")
OmegaSchedule = StrEnum("OmegaSchedule", "cosine constant")
WoInit = StrEnum("WoInit", "random zero")
PairSource = StrEnum("PairSource", "annotation recomputed frozen_rm gold random")
RewardScale = StrEnum("RewardScale", "raw match_frozen")
RewardShape = StrEnum("RewardShape", "raw par")
FeedbackSource = StrEnum("FeedbackSource", "rollout learner")
FeedbackRefresh = StrEnum("FeedbackRefresh", "last_epoch exact none")
SyncBackend = StrEnum("SyncBackend", "object_store nccl ipc")
Overlong = StrEnum("Overlong", "error drop")
OnAlarm = StrEnum("OnAlarm", "warn stop")
WandbMode = StrEnum("WandbMode", "offline online disabled")
Placement = StrEnum(
    "Placement",
    {"PACK": "PACK", "SPREAD": "SPREAD", "STRICT_PACK": "STRICT_PACK", "STRICT_SPREAD": "STRICT_SPREAD"},
)
LEAST_TEMPERATURE = 0.01
"""vLLM silently samples at 0.01 where less is asked for, and the learner's log-probs would not."""

# Numbers are strict: neither the text "3" nor `true` counts as a number.
Count = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(strict=True, ge=LEAST_TEMPERATURE, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Options = dict[str, Any]

_SCHEMA = ConfigDict(extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True)


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class RunConfig:
    """Which run this is."""

    name: Annotated[str, Resume.free] = "run"
    """Directory of the run below ``root``: letters, digits, ``.``, ``_`` and ``-``."""
    root: Annotated[str, Resume.free] = "runs"
    """Directory under which runs are written, one directory each."""
    seed: Annotated[Natural, Prepares.always] = 0
    """Seeds sampling, data order and every initialisation."""
    resume: Annotated[bool, Resume.free] = False
    """Continue the run of this name from its newest checkpoint; without it the run must be new."""
    reshard: Annotated[bool, Resume.free] = False
    """Let a resumed run change ranks, replicas, ZeRO stage or token budgets, and so the order of its sums."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class ModelConfig:
    """The pretrained models and the precision they are loaded in."""

    policy: Annotated[str, Resume.content, Compare.seed] = PREPARED
    """Hugging Face directory or id of the policy and its tokenizer; ``prepared`` is `r2m-ray prepare`'s."""
    reward: Annotated[str, Resume.content] = PREPARED
    """Hugging Face directory or id of the reward model: sequence classification with one label."""
    reference: Annotated[str | None, Resume.content, Compare.seed] = None
    """Directory or id of π_ref; the initial policy when null."""
    dtype: Dtype = Dtype.float32
    """Floating-point type of the policy, the reference and the rollout engine."""
    reward_dtype: Dtype = Dtype.float32
    """Floating-point type of the frozen reward trunk; the R2M head is always float32."""
    attention: str = "sdpa"
    """transformers' ``attn_implementation`` of learner, reference and reward trunk."""
    score_layer: str = "score"
    """Attribute path of the reward model's final linear layer, which φ starts as a copy of."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class TaskConfig:
    """What the policy is trained on, and how long its texts may be."""

    name: Annotated[TaskName, Prepares.always] = TaskName.note2answer
    """The self-contained world with a known gold score, or preference pairs of your own."""
    train_file: Annotated[str | None, Resume.content, Prepares.content] = None
    """Preferences: JSONL (plain or .gz), Parquet or a `datasets` id, the pairs to train on."""
    eval_file: Annotated[str | None, Resume.content, Prepares.content] = None
    """Preferences: the held-out pairs, in any form that ``train_file`` takes."""
    prompt_field: Annotated[str, Prepares.preferences] = "prompt"
    """Preferences: name of the field that holds the prompt."""
    chosen_field: Annotated[str, Prepares.preferences] = "chosen"
    """Preferences: name of the field that holds the preferred response."""
    rejected_field: Annotated[str, Prepares.preferences] = "rejected"
    """Preferences: name of the field that holds the other response."""
    max_prompt_tokens: Annotated[Count, Prepares.always] = 64
    """Policy tokens of a prompt at most; longer ones are treated as ``overlong`` says."""
    max_new_tokens: Annotated[Count, Prepares.always] = 48
    """Tokens of a sampled response at most, the end token included."""
    overlong: Annotated[Overlong, Prepares.preferences] = Overlong.error
    """Whether a row of the data over the limits is an error, or is dropped and counted."""
    skip_bad_rows: Annotated[Natural, Resume.free] = 0
    """Preferences: rows of a file that may be skipped and counted because they are no preference pairs."""
    values_per_attribute: Annotated[int, Field(strict=True, ge=2, le=18), Prepares.note2answer] = 6
    """note2answer: values that each of a note's attributes can have; tiny models learn few sooner."""
    self_correct_prob: Annotated[Fraction, Prepares.note2answer] = 0.6
    """note2answer: how often the demonstrator corrects a wrong fact right after it."""
    annotator_bias: Annotated[Fraction, Prepares.note2answer] = 0.3
    """note2answer: fraction of the preference pairs labelled by an annotator who sees only style."""
    label_temperature: Annotated[Positive, Prepares.note2answer] = 0.3
    """note2answer: Bradley–Terry temperature at which the other pairs are labelled by gold."""
    reward_reads_prompt: Annotated[bool, Prepares.note2answer] = False
    """note2answer: whether the reward model sees the note, or the response alone."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class PrepareConfig:
    """Models that `r2m-ray prepare` trains from scratch, so that a run needs no download."""

    root: Annotated[str, Resume.free, Prepares.never, Compare.never] = "prepared"
    """Directory of prepared models, one directory per digest of what went into them."""
    policy_layers: Count = 3
    """Layers of the policy."""
    policy_width: Count = 96
    """Width P of the policy."""
    policy_heads: Count = 3
    """Attention heads of the policy; they divide its width."""
    reward_layers: Count = 2
    """Layers of the reward model."""
    reward_width: Count = 64
    """Width D of the reward model."""
    reward_heads: Count = 2
    """Attention heads of the reward model; they divide its width."""
    vocabulary: Count = 2048
    """Preferences: entries of the byte-level BPE vocabulary that is trained on the data."""
    sft_rows: Count = 32000
    """note2answer: demonstrations to generate."""
    sft_steps: Natural = 1000
    """Optimizer steps of supervised fine-tuning."""
    sft_batch: Count = 32
    """Rows of each of these steps."""
    sft_learning_rate: NonNegative = 3e-3
    """AdamW's learning rate in supervised fine-tuning."""
    pair_rows: Count = 20000
    """note2answer: preference pairs to generate."""
    reward_steps: Natural = 300
    """Optimizer steps of reward-model training."""
    reward_batch: Count = 64
    """Pairs of each of these steps."""
    reward_learning_rate: NonNegative = 2e-3
    """AdamW's learning rate in reward-model training."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class AlgoConfig:
    """One training step: what is sampled, and how the policy learns from it (Eqs. 1–2)."""

    steps: Annotated[Count, Compare.always] = 100
    """T, training steps of the run; ω's schedule spans them."""
    prompts_per_step: Count = 16
    """n, prompts sampled in each step."""
    responses_per_prompt: Annotated[int, Field(strict=True, ge=2)] = 8
    """K, responses sampled for each prompt."""
    prompts_per_shard: Count = 4
    """Prompts of one unit of work; no role splits a shard."""
    advantage: Advantage = Advantage.rloo
    """How the rewards of a group become advantages (Eq. 1): a key of ``core.advantages.ADVANTAGES``."""
    epochs: Count = 2
    """k, passes over each batch."""
    minibatch_prompts: Count = 8
    """Prompts of one optimizer step of the policy."""
    ratio: Ratio = Ratio.sequence
    """What the importance ratio ρ of Eq. 2 is taken over: the response, each token, or their mean."""
    clip_low: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.2
    """ε below: the ratio is clipped at 1 − ``clip_low``."""
    clip_high: Positive = 0.2
    """ε above: the ratio is clipped at 1 + ``clip_high``."""
    old_logp: OldLogprobs = OldLogprobs.learner
    """Who scores π_old: one pass of the learner, or the engine that sampled, with truncated correction."""
    importance_cap: Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)] = 2.0
    """Upper bound of the learner/rollout weights when ``old_logp=rollout``."""
    kl_weight: NonNegative = 0.04
    """β, weight of the KL penalty to the reference."""
    kl_estimator: KLEstimator = KLEstimator.k3
    """Monte-Carlo estimator of KL(π_θ‖π_ref) per token."""
    kl_place: KLPlace = KLPlace.loss
    """Whether the penalty is a term of the loss or is subtracted from the reward."""
    temperature: Annotated[Temperature, Compare.always] = 1.0
    """Temperature of sampling, and of the log-probs in the ratio."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class RolloutConfig:
    """The vLLM engines that sample."""

    replicas: Annotated[Count, Resume.free] = 1
    """Engines; each samples complete shards."""
    engine_args: Options = field(default_factory=dict)
    """Passed to vLLM's EngineArgs as they are."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class PolicyConfig:
    """The DeepSpeed learner."""

    ranks: Annotated[Count, Resume.reshard] = 1
    """Data-parallel learner ranks."""
    learning_rate: NonNegative = 3e-4
    """AdamW's learning rate, after the warm-up."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay."""
    warmup_steps: Natural = 0
    """Optimizer steps of linear warm-up."""
    max_grad_norm: Positive = 1.0
    """Global gradient norm above which gradients are scaled down."""
    tokens_per_microbatch: Annotated[Count, Resume.reshard] = 2048
    """Tokens of one forward pass, padding included."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    deepspeed: Options = field(default_factory=dict)
    """Passed to ``deepspeed.initialize`` as its config; `RESHARD_OPTIONS` of it may change with ranks."""


RESHARD_OPTIONS = ("policy.deepspeed.zero_optimization",)
"""Paths inside options that a resumed run may change with ``run.reshard=true``."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class ReferenceConfig:
    """The frozen reference policy π_ref."""

    replicas: Annotated[Count, Resume.free] = 1
    """Copies; each shard goes to one of them."""
    tokens_per_microbatch: Annotated[Count, Resume.reshard] = 4096
    """Tokens of one forward pass, padding included."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class RewardConfig:
    """The frozen reward trunk with its R2M head, and the head's own training (Eqs. 3–7)."""

    replicas: Annotated[Count, Resume.reshard] = 1
    """Copies, kept identical; each annotates its shards and contributes their gradients."""
    tokens_per_microbatch: Annotated[Count, Resume.reshard] = 4096
    """Padded tokens of one trunk forward pass."""
    max_length: Annotated[Count, Prepares.always] = 4096
    """Tokens the trunk reads at most; longer inputs are an error."""
    omega_floor: Fraction = 0.6
    """Ω of Eq. 4; 1 means the original reward model in every step (vanilla)."""
    omega_schedule: OmegaSchedule = OmegaSchedule.cosine
    """How ω(t) of Eq. 4 goes to its floor: along a cosine, or it is the floor from the first step."""
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
    """Who picks winner and loser of Eq. 5: rewards of the annotation, of the update, of the frozen model, or
    gold, where the task knows it; ``random`` draws two rows, seeded by run, step and shard."""
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
    """Start of W_o: that Gaussian, or zero, so that the first scores are the original reward model's."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class FeedbackConfig:
    """h, the policy's hidden states after its final norm, which the reward model reads."""

    source: FeedbackSource = FeedbackSource.rollout
    """Who exports h for the annotation."""
    refresh: FeedbackRefresh = FeedbackRefresh.last_epoch
    """Which h the reward update reads (Algorithm 1 line 13): the last epoch's, an extra pass's, or, for
    ``none``, the annotation's."""
    noise: Fraction = 0.0
    """Share of Gaussian noise with h's own mean and std that replaces h; 1 is the paper's w/ Noise."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class SyncConfig:
    """How the learner's weights reach the rollout engines."""

    backend: SyncBackend = SyncBackend.object_store
    """Ray's object store works everywhere; nccl and ipc need GPUs."""
    bucket_mb: Count = 256
    """Megabytes of one transfer."""
    verify_every: Natural = 10
    """Steps between checks of the digests of ranks, replicas and engines; 0 checks the first sync alone."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class EvaluateConfig:
    """What is measured on held-out data during a run."""

    every: Natural = 5
    """Steps between evaluations; 0 evaluates only at the start and at the end."""
    prompts: Count = 64
    """Held-out prompts, the same ones each time."""
    responses_per_prompt: Count = 1
    """Responses sampled for each; from 2 on, what the rewards are worth within a prompt is measured too."""
    pairs: Natural = 128
    """Held-out preference pairs for reward-model accuracy; note2answer adds its counterfactual kinds."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class CheckpointConfig:
    """When the state of a run is committed."""

    every: Natural = 10
    """Steps between checkpoints, 0 for none; the last step is always saved."""
    keep: Count = 2
    """Newest checkpoints to keep."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class ClusterConfig:
    """Where the actors run, what each may use, and how long to wait for them."""

    address: str = "local"
    """``local`` starts a Ray cluster for the run; ``auto``, or an address, joins one that runs already;
    ``none`` runs every role in this process, without Ray."""
    cpus: Count = 2
    """Logical CPUs of a local cluster."""
    object_store_gb: Positive = 1.0
    """GiB of a local cluster's object store, which holds trajectories and hidden states."""
    threads_per_actor: Annotated[Count, Resume.reshard] = 1
    """CPU threads of each actor; 1 makes runs repeat exactly."""
    cpus_per_actor: NonNegative = 0.25
    """Logical CPUs that each actor reserves; a fraction lets several share one."""
    gpus_per_rollout: Annotated[NonNegative, Resume.reshard] = 0.0
    """GPUs of each rollout engine; 0 runs it on the CPU."""
    gpus_per_learner: Annotated[NonNegative, Resume.reshard] = 0.0
    """GPUs of each learner rank; 0 runs it on the CPU."""
    gpus_per_reference: Annotated[NonNegative, Resume.reshard] = 0.0
    """GPUs of each reference replica; 0 runs it on the CPU."""
    gpus_per_reward: Annotated[NonNegative, Resume.reshard] = 0.0
    """GPUs of each reward replica; 0 runs it on the CPU."""
    placement: Placement = Placement.PACK
    """Ray's placement strategy."""
    start_timeout_s: Positive = 300.0
    """Seconds until every actor must be placed and ready."""
    phase_timeout_s: Positive = 600.0
    """Seconds until each phase of a step must have ended; an actor that has not answered is replaced."""
    stop_grace_s: Positive = 240.0
    """Seconds that a run may take, after a stop signal, to reach the end of its step and save it."""
    max_recoveries: Natural = 3
    """Lost actors in a row, without a finished step between them, after which the run gives up."""
    allow_unauthenticated: bool = False
    """Join a cluster that asks for no token; whoever reaches such a cluster can run code on it."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class GuardConfig:
    """Numbers that stop a run, because going on would waste or ruin it."""

    nonfinite_steps: Count = 3
    """Steps in a row with a NaN or infinite reward, log-prob, h, loss or gradient that stop the run."""
    logprob_gap: Positive = 0.5
    """Mean gap between the engine's and the learner's log-probs of a step, in nats per token, above which
    the engine cannot hold the learner's weights."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class MonitorConfig:
    """Alarms: bounds that healthy runs keep, each compared with the median of the last ``steps`` steps.

    A run whose reward is the frozen model's has scale ratio 1, gap 0 and flip rate 0, whatever it does; its
    KL alone can raise an alarm.
    """

    on_alarm: OnAlarm = OnAlarm.warn
    """Whether an alarm is shown and logged, or also ends the run with exit code 4 after its step is saved."""
    steps: Count = 5
    """Steps that a level is the median of, so that a single noisy step raises no alarm."""
    scale_ratio: Annotated[float, Field(strict=True, gt=1, allow_inf_nan=False)] = 2.0
    """The own reward's spread within groups over the frozen model's: healthy runs stay at 1 or below,
    self-labelled ones that collapsed reached 6."""
    frozen_gap: Positive = 3.0
    """How far the own reward may rise above ω times the frozen one, in units of the frozen spread of a group,
    since the first ``steps`` steps: the policy gains what the frozen model does not see."""
    flip_rate: Fraction = 0.35
    """Share of the own reward's best and worst rows that the frozen model orders otherwise; chance is 0.5."""
    kl: Positive = 50.0
    """KL to the reference of a step's samples, in nats per response."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class LoggingConfig:
    """What is written beside the run's own files."""

    wandb: WandbMode = WandbMode.offline
    """Whether Weights & Biases logs to the run's directory, to its server, or not at all."""
    wandb_project: str = "r2m_ray"
    """Project that the runs appear under."""
    rollouts_per_step: Natural = 8
    """Rows of each step written to rollouts.jsonl."""


@dataclass(kw_only=True, slots=True, config=_SCHEMA)
class Config:
    """The configuration of a run, section by section."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: Annotated[TaskConfig, Compare.always] = field(default_factory=TaskConfig)
    prepare: Annotated[PrepareConfig, Prepares.always, Compare.always] = field(default_factory=PrepareConfig)
    algo: Annotated[AlgoConfig, Compare.arm] = field(default_factory=AlgoConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: Annotated[PolicyConfig, Compare.arm] = field(default_factory=PolicyConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    reward: Annotated[RewardConfig, Compare.arm] = field(default_factory=RewardConfig)
    feedback: Annotated[FeedbackConfig, Compare.arm] = field(default_factory=FeedbackConfig)
    sync: Annotated[SyncConfig, Resume.free] = field(default_factory=SyncConfig)
    evaluate: Annotated[EvaluateConfig, Resume.free, Compare.always] = field(default_factory=EvaluateConfig)
    checkpoint: Annotated[CheckpointConfig, Resume.free] = field(default_factory=CheckpointConfig)
    cluster: Annotated[ClusterConfig, Resume.free] = field(default_factory=ClusterConfig)
    guard: Annotated[GuardConfig, Resume.free] = field(default_factory=GuardConfig)
    monitor: Annotated[MonitorConfig, Resume.free] = field(default_factory=MonitorConfig)
    logging: Annotated[LoggingConfig, Resume.free] = field(default_factory=LoggingConfig)

    @property
    def uses_feedback(self) -> bool:
        """Whether any step gives the policy's hidden states a weight; otherwise h has width 0."""
        return self.reward.omega_floor < 1.0

    @property
    def uses_human_pairs(self) -> bool:
        """Whether the head is ever fitted to the task's own preference pairs."""
        return self.reward.anchor_fraction > 0 or self.reward.warmup_pairs > 0
