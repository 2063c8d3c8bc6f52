"""Rules between the fields that say where a run computes: engines, GPUs, weight sync, cluster, deadlines."""

from __future__ import annotations

from collections.abc import Iterator

from r2m_ray.config.rule import Rule, registrar
from r2m_ray.config.schema import Config, Dtype, SyncBackend
from r2m_ray.errors import Problem, hint, shown

PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
LEAST_OBJECT_STORE_GB = 0.08

RULES: list[Rule] = []
rule = registrar(RULES)


@rule("sync.backend", "cluster.gpus_per_learner", "cluster.gpus_per_rollout")
def _sync_backend(config: Config) -> Iterator[Problem]:
    learner, rollout = config.cluster.gpus_per_learner, config.cluster.gpus_per_rollout
    backend = config.sync.backend
    given = f"cluster.gpus_per_learner={learner:g} and cluster.gpus_per_rollout={rollout:g}"
    if backend is not SyncBackend.object_store and 0 in (learner, rollout):
        message = f"{backend.value} joins GPUs, but {given}; give both one, or use object_store"
        yield Problem("sync.backend", message)
    elif backend is SyncBackend.ipc and learner + rollout > 1:
        message = f"ipc shares the memory of one GPU, but with {given} no two of them share one"
        yield Problem("sync.backend", f"{message}; use nccl, or shares that add up to 1")


@rule(
    "cluster.gpus_per_learner", "cluster.gpus_per_rollout",
    "cluster.gpus_per_reference", "cluster.gpus_per_reward",
)  # fmt: skip
def _whole_gpus(config: Config) -> Iterator[Problem]:
    for path, count in _gpus(config).items():
        if count > 1 and path != "cluster.gpus_per_rollout":
            yield Problem(path, f"{count:g}, but each of these actors computes on one GPU; use 1")
        elif count > 1 and count % 1:
            below = int(count)
            message = (
                f"{count:g} is neither a share of one GPU nor a whole number; use {below} or {below + 1}"
            )
            yield Problem(path, message)


@rule("policy.ranks", "reward.replicas", "cluster.gpus_per_learner", "cluster.gpus_per_reward")
def _shared_gpus(config: Config) -> Iterator[Problem]:
    for path, count, field, gpus in (
        ("cluster.gpus_per_learner", config.policy.ranks, "policy.ranks", config.cluster.gpus_per_learner),
        (
            "cluster.gpus_per_reward",
            config.reward.replicas,
            "reward.replicas",
            config.cluster.gpus_per_reward,
        ),
    ):
        if count > 1 and 0 < gpus < 1:
            yield Problem(
                path,
                f"{gpus:g} may put two of {field}={count} on one GPU, where NCCL cannot join them; use 1, or "
                f"{field}=1",
            )


@rule("rollout.engine_args", "cluster.gpus_per_rollout")
def _engine_gpus(config: Config) -> Iterator[Problem]:
    args, gpus = config.rollout.engine_args, config.cluster.gpus_per_rollout
    sizes = {}
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        sizes[name] = args.get(name, 1)
        if not isinstance(sizes[name], int) or sizes[name] < 1:
            path = f"rollout.engine_args.{name}"
            yield Problem(path, f"{shown(sizes[name])} is not a whole number ≥ 1; leave it out for 1")
            return
    if sizes["data_parallel_size"] > 1:
        message = f"{sizes['data_parallel_size']}, but engines are replicated by rollout.replicas; use that"
        yield Problem("rollout.engine_args.data_parallel_size", message)
    ranks = sizes["tensor_parallel_size"] * sizes["pipeline_parallel_size"]
    if ranks > 1 and args.get("distributed_executor_backend") != "mp":
        yield Problem(
            "rollout.engine_args.distributed_executor_backend",
            f"an engine of {ranks} ranks runs inside the placement of its actor; set it to mp",
        )
    # On CPUs the ranks share the cores of their actor.
    if gpus and ranks != max(gpus, 1) and (gpus <= 1 or gpus == int(gpus)):
        yield Problem(
            "cluster.gpus_per_rollout",
            f"{gpus:g}, but an engine computes on tensor_parallel_size × pipeline_parallel_size = {ranks} "
            f"(rollout.engine_args); make them equal",
        )


@rule("cluster.phase_timeout_s", "cluster.stop_grace_s")
def _deadlines(config: Config) -> Iterator[Problem]:
    grace, phase = config.cluster.stop_grace_s, config.cluster.phase_timeout_s
    if grace >= phase:
        yield Problem(
            "cluster.stop_grace_s",
            f"{grace:g} is not less than cluster.phase_timeout_s={phase:g}, so a run told to stop would "
            f"first replace an actor that hangs; use {0.9 * phase:g} or less",
        )


@rule("model.dtype", "model.reward_dtype")
def _half_precision_on_cpu(config: Config) -> Iterator[Problem]:
    gpus = _gpus(config)
    reward = gpus.pop("cluster.gpus_per_reward")
    for path, dtype, on_cpu in (
        ("model.dtype", config.model.dtype, 0 in gpus.values()),
        ("model.reward_dtype", config.model.reward_dtype, reward == 0),
    ):
        if dtype is Dtype.bfloat16 and on_cpu:
            message = "bfloat16 is slow and less exact on a CPU; use float32, or give every role of it a GPU"
            yield Problem(path, message, warning=True)


@rule(
    "cluster.address", "cluster.cpus", "cluster.cpus_per_actor",
    "policy.ranks", "rollout.replicas", "reward.replicas", "reference.replicas",
)  # fmt: skip
def _local_cpus(config: Config) -> Iterator[Problem]:
    cpus, each = config.cluster.cpus, config.cluster.cpus_per_actor
    actors = sum(
        (config.policy.ranks, config.rollout.replicas, config.reward.replicas, config.reference.replicas)
    )
    if config.cluster.address == "local" and actors * each > cpus:
        yield Problem(
            "cluster.cpus_per_actor",
            f"{actors} actors of {each:g} need more than cluster.cpus={cpus}; use {cpus / actors:.3g}, "
            "fewer replicas, or more cpus",
        )


@rule("cluster.address", "cluster.object_store_gb")
def _object_store(config: Config) -> Iterator[Problem]:
    size = config.cluster.object_store_gb
    if config.cluster.address == "local" and size < LEAST_OBJECT_STORE_GB:
        message = f"{size:g} is less than Ray starts with; use {LEAST_OBJECT_STORE_GB} or more"
        yield Problem("cluster.object_store_gb", message)


@rule("cluster.placement")
def _placement(config: Config) -> Iterator[Problem]:
    placement = config.cluster.placement
    if placement not in PLACEMENTS:
        message = f"{shown(placement)} is not one of {', '.join(PLACEMENTS)}."
        yield Problem("cluster.placement", message + hint(placement.upper(), PLACEMENTS))


@rule("rollout.engine_args")
def _model_code(config: Config) -> Iterator[Problem]:
    path = "rollout.engine_args.trust_remote_code"
    if config.rollout.engine_args.get("trust_remote_code"):
        yield Problem(
            path, "code that comes with a model is never run; use a model that vLLM knows by itself"
        )


def _gpus(config: Config) -> dict[str, float]:
    return {
        "cluster.gpus_per_learner": config.cluster.gpus_per_learner,
        "cluster.gpus_per_rollout": config.cluster.gpus_per_rollout,
        "cluster.gpus_per_reference": config.cluster.gpus_per_reference,
        "cluster.gpus_per_reward": config.cluster.gpus_per_reward,
    }
