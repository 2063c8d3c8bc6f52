"""The half of the configuration schema that surrounds the method: run, task, preparation and operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from r2m_ray.config.choices import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    OnAlarm,
    Overlong,
    Positive,
    Range,
    SyncBackend,
    TaskName,
    WandbMode,
)


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Which run this is."""

    name: str = "run"
    """Directory of the run below ``root``: letters, digits, ``.``, ``_`` and ``-``."""
    root: str = "runs"
    """Directory under which runs are written, one directory each."""
    seed: Natural = 0
    """Seeds sampling, data order and every initialisation."""
    resume: bool = False
    """Continue the run of this name from its newest checkpoint; without it the run must be new."""
    reshard: bool = False
    """Let a resumed run change learner ranks, reward replicas, ZeRO stage or token budgets: its state stays
    exact, but sums are taken in another order."""


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """What the policy is trained on, and how long its texts may be."""

    name: TaskName = TaskName.note2answer
    """The self-contained world with a known gold score, or preference pairs of your own."""
    train_file: str | None = None
    """Preferences: JSONL (plain or .gz), Parquet or a `datasets` id, the pairs to train on."""
    eval_file: str | None = None
    """Preferences: the held-out pairs, in any form that ``train_file`` takes."""
    prompt_field: str = "prompt"
    """Preferences: name of the field that holds the prompt."""
    chosen_field: str = "chosen"
    """Preferences: name of the field that holds the preferred response."""
    rejected_field: str = "rejected"
    """Preferences: name of the field that holds the other response."""
    max_prompt_tokens: Count = 64
    """Policy tokens of a prompt at most; longer ones are treated as ``overlong`` says."""
    max_new_tokens: Count = 48
    """Tokens of a sampled response at most, the end token included."""
    overlong: Overlong = Overlong.error
    """Whether a row of the data over the limits is an error or dropped and counted."""
    skip_bad_rows: Natural = 0
    """Preferences: rows of a file that may be skipped and counted because they are no preference pairs."""
    values_per_attribute: Annotated[int, Range(2, 18)] = 6
    """note2answer: values that each of a note's attributes can have; tiny models tell few apart sooner."""
    self_correct_prob: Fraction = 0.6
    """note2answer: how often the demonstrator corrects a wrong fact right after it."""
    annotator_bias: Fraction = 0.3
    """note2answer: fraction of the preference pairs labelled by an annotator who sees only style."""
    label_temperature: Positive = 0.3
    """note2answer: Bradley–Terry temperature at which the other pairs are labelled by gold."""
    reward_reads_prompt: bool = False
    """note2answer: whether the reward model sees the note, or the response alone."""


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """Models that `r2m-ray prepare` trains from scratch, so that a run needs no download."""

    root: str = "prepared"
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


@dataclass(kw_only=True, slots=True)
class SyncConfig:
    """How the learner's weights reach the rollout engines."""

    backend: SyncBackend = SyncBackend.object_store
    """Ray's object store works everywhere; nccl and ipc need GPUs."""
    bucket_mb: Count = 256
    """Megabytes of one transfer."""
    verify_every: Natural = 10
    """Steps between checks of digests, 0 for none: of learner ranks and reward replicas among each other,
    and, with object_store, of the engines, whose first sync is always checked."""


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """What is measured on held-out data during a run."""

    every: Natural = 5
    """Steps between evaluations; 0 evaluates only at the start and at the end."""
    prompts: Count = 64
    """Held-out prompts, the same ones each time."""
    responses_per_prompt: Count = 1
    """Responses sampled for each; from 2 on, what the rewards are worth within a prompt is measured too."""
    pairs: Natural = 128
    """Held-out preference pairs that reward-model accuracy is measured on; note2answer adds half as many of
    each counterfactual kind."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When the state of a run is committed."""

    every: Natural = 10
    """Steps between checkpoints, 0 for none; the last step is always saved."""
    keep: Count = 2
    """Newest checkpoints to keep."""


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Where the actors run, what each may use, and how long to wait for them."""

    address: str = "local"
    """``local`` starts a Ray cluster for the run; ``auto``, or an address, joins one that runs already;
    ``none`` runs every role in this process, without Ray."""
    cpus: Count = 2
    """Logical CPUs of a local cluster."""
    object_store_gb: Positive = 1.0
    """GiB of a local cluster's object store, which holds trajectories and hidden states."""
    threads_per_actor: Count = 1
    """CPU threads of each actor; 1 makes runs repeat exactly."""
    cpus_per_actor: NonNegative = 0.25
    """Logical CPUs that each actor reserves; a fraction lets several share one."""
    gpus_per_rollout: NonNegative = 0.0
    """GPUs of each rollout engine; 0 runs it on the CPU."""
    gpus_per_learner: NonNegative = 0.0
    """GPUs of each learner rank; 0 runs it on the CPU."""
    gpus_per_reference: NonNegative = 0.0
    """GPUs of each reference replica; 0 runs it on the CPU."""
    gpus_per_reward: NonNegative = 0.0
    """GPUs of each reward replica; 0 runs it on the CPU."""
    placement: str = "PACK"
    """Ray's placement strategy: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD."""
    start_timeout_s: Positive = 300.0
    """Seconds until every actor must be placed and ready."""
    phase_timeout_s: Positive = 600.0
    """Seconds until each phase of a step must have ended; an actor that has not answered is replaced."""
    stop_grace_s: Positive = 240.0
    """Seconds that a run told to stop may take to reach the end of its step and save it."""
    max_recoveries: Natural = 3
    """Lost actors in a row, without a finished step between them, after which the run gives up."""
    allow_unauthenticated: bool = False
    """Join a cluster that asks for no token; whoever reaches such a cluster can run code on it."""


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """Numbers that stop a run, because going on would waste or ruin it."""

    nonfinite_steps: Count = 3
    """Steps in a row with a NaN or infinite reward, log-prob, h, loss or gradient that stop the run."""
    logprob_gap: Positive = 0.5
    """Mean gap between the engine's and the learner's log-probs of a step, in nats per token, above which
    the engine cannot hold the learner's weights."""


@dataclass(kw_only=True, slots=True)
class MonitorConfig:
    """Alarms: bounds that healthy runs keep, each compared with the median of the last ``steps`` steps.

    A run whose reward is the frozen model's has scale ratio 1, gap 0 and flip rate 0, whatever it does; its
    KL alone can raise an alarm.
    """

    on_alarm: OnAlarm = OnAlarm.warn
    """Whether an alarm is told and logged, or also ends the run, with exit code 4, once its step is saved."""
    steps: Count = 5
    """Steps that a level is the median of, so that a single noisy step raises no alarm."""
    scale_ratio: Annotated[float, Range(1, low_open=True)] = 2.0
    """The own reward's spread within groups over the frozen model's: healthy runs stay at 1 or below, and
    self-labelled ones that collapsed reached 6. A wider reward also weakens the KL penalty."""
    frozen_gap: Positive = 3.0
    """How far the own reward may rise above ω times the frozen one since the first ``steps`` steps, in units
    of their frozen spread within groups: the policy gains what the frozen model does not see. A fall is
    none."""
    flip_rate: Fraction = 0.35
    """Share of the own reward's best and worst rows that the frozen model puts in the other order; one half
    would mean that nothing is left of the model that the head started from."""
    kl: Positive = 50.0
    """KL to the reference of a step's samples, in nats per response: beyond tens of nats, texts are ones that
    neither the reference nor the reward model's training data know."""


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is written beside the run's own files."""

    wandb: WandbMode = WandbMode.offline
    """Whether Weights & Biases logs to the run's directory, to its server, or not at all."""
    wandb_project: str = "r2m_ray"
    """Project that the runs appear under."""
    rollouts_per_step: Natural = 8
    """Rows of each step written to rollouts.jsonl."""
