"""vLLM as the rollout engine drives it: environment, versions, engine arguments, requests in, samples out.

This module and the two that run in vLLM's workers are the only ones that know vLLM. They use its
public or documented extension points, and refuse versions they were not tested with.
"""

from __future__ import annotations

import difflib
import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from r2m_ray.errors import DeviceLost, InputError, RunError

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.33")
OBJECT_STORE = "object_store"

_OWN_ARGS = (
    "model", "tokenizer", "skip_tokenizer_init", "trust_remote_code", "dtype", "seed", "max_model_len",
    "logprobs_mode", "worker_cls", "worker_extension_cls", "kv_transfer_config", "weight_transfer_config",
    "disable_hybrid_kv_cache_manager", "load_format",
)  # fmt: skip

# Values with which a token's slot, or the step that computes it, is not the one the export knows.
_EXPORT_NEEDS = {
    "pipeline_parallel_size": 1,
    "prefill_context_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "speculative_config": None,
    "enable_dbo": False,
}

_CONNECTOR = {
    "kv_transfer_config": {
        "kv_connector": "HiddenStatesConnector",
        "kv_connector_module_path": "r2m_ray.engines.rollout.vllm_worker",
        "kv_role": "kv_producer",
    },
    "disable_hybrid_kv_cache_manager": True,
}

# A finished request is read in the step after its last, and its blocks are free when the output of that step
# has been processed. With asynchronous scheduling other batches are queued before it.
_DRAIN_STEPS = 8
_QUEUED_BATCHES = 2


@dataclass(frozen=True, slots=True)
class Request:
    """One row to sample; temperature 0 is greedy."""

    prompt_ids: Sequence[int]
    seed: int
    temperature: float
    max_new_tokens: int
    stop_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Export:
    """The hidden states of one finished request, on the CPU.

    hidden_TP: one row per input token. token_T, position_T: int64, what each row was computed from.
    """

    hidden_TP: Tensor
    token_T: Tensor
    position_T: Tensor


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled row: tokens with their log-probs, why it ended, and its hidden states where exported."""

    token_ids: list[int]
    logprobs: list[float]
    truncated: bool
    export: Export | None


@dataclass(frozen=True, slots=True)
class WeightReceipt:
    """What one worker received in a weight update.

    digest: sha256 of the buckets in order of arrival, empty unless asked for. missing: vLLM's own parameters
    that nothing was loaded into. nbytes: bytes received.
    """

    digest: str
    missing: tuple[str, ...]
    nbytes: int


def refuse_unknown_version(version: str) -> None:
    """Raise InputError unless this vLLM version is one the adapter was tested with."""
    if not SUPPORTED_VLLM.contains(version, prereleases=True):
        raise InputError(
            f"vLLM {version} is installed, but the rollout engine was tested with {SUPPORTED_VLLM}; "
            "install one of those"
        )


def prepare_environment(engine_args: Mapping[str, Any]) -> None:
    """Set the process environment that vLLM reads on import; what the user set stays.

    The engine runs in this very process, sends no usage statistics, and on a CPU caches up to 1 GiB of keys
    and values. The number of threads is the caller's OMP_NUM_THREADS. Ranks of an engine start as new
    processes, because a fork would copy the locks of this one. On CPUs they are not bound to cores, because
    vLLM would ask for one NUMA node each.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if engine_args.get("tensor_parallel_size", 1) != 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if "kv_cache_memory_bytes" not in engine_args:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


class VLLMEngine:
    """One in-process vLLM engine.

    own_args: ``vllm.EngineArgs`` that the rollout engine sets. engine_args: those that the user adds. The
    other arguments are those of ``RolloutEngine``.
    """

    def __init__(
        self,
        own_args: Mapping[str, Any],
        engine_args: Mapping[str, Any],
        *,
        export_hidden: bool,
        weight_backend: str,
    ) -> None:
        prepare_environment(engine_args)
        # vLLM configures itself when imported, so not before the environment is set.
        import vllm
        from vllm.config import WeightTransferConfig
        from vllm.distributed.kv_transfer import has_kv_transfer_group
        from vllm.platforms import current_platform

        refuse_unknown_version(vllm.__version__)
        _check_engine_args(engine_args, exports=export_hidden)
        if has_kv_transfer_group():
            raise InputError(
                "this process already runs a rollout engine that exports hidden states, and vLLM holds one "
                "connector per process; close() it first, or start this one in a process of its own"
            )
        self._exports = export_hidden
        self._updating = False
        self._owns_process_group = not torch.distributed.is_initialized()
        self._llm = vllm.LLM(
            **own_args,
            # By itself vLLM would fall back to pickled weights.
            load_format="safetensors",
            logprobs_mode="processed_logprobs",
            worker_cls="r2m_ray.engines.rollout.vllm_worker.RolloutWorker",
            weight_transfer_config=WeightTransferConfig(backend=weight_backend),
            **(_CONNECTOR if self._exports else {}),
            **engine_args,
        )
        try:
            _refuse_preemption_that_changes_tokens(self._llm.llm_engine.vllm_config)
        except InputError:
            self.close()
            raise
        if self._exports:
            self._llm.collective_rpc("export_hidden")
        if current_platform.is_cpu():
            self._llm.collective_rpc("keep_generators")

    def generate(self, requests: Sequence[Request]) -> list[Sampled]:
        """Sample all requests as one batch; returns them in order."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        params = [
            SamplingParams(
                seed=request.seed,
                temperature=request.temperature,
                top_p=1.0,
                top_k=0,
                max_tokens=request.max_new_tokens,
                stop_token_ids=list(request.stop_token_ids),
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for request in requests
        ]
        with self._workers() as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            names = [(output.kv_transfer_params or {}).get("request_id", "") for output in outputs]
            exports = self._take_exports(set(names)) if self._exports else {}
        return [_sampled(o, exports.get(name)) for o, name in zip(outputs, names, strict=True)]

    def forget_prefixes(self) -> None:
        """Drop every cached prefix and its hidden states.

        Raises RunError where blocks of the cache are still in use although no request is left.
        """
        with self._workers() as llm:
            if not self._step_until(llm.reset_prefix_cache):
                raise RunError(
                    "rollout engine: the prefix cache is in use and cannot be reset; restart the engine"
                )
            if self._exports:
                llm.collective_rpc("forget_hidden")

    def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        with self._workers() as llm:
            llm.init_weight_transfer_engine({"init_info": dict(init_info)})

    def begin_weight_update(self) -> None:
        with self._workers() as llm:
            if self._updating:
                # Only a finished update makes room for another; its weights are overwritten by the next.
                llm.finish_weight_update()
            llm.start_weight_update()
        self._updating = True

    def load(self, update_info: Mapping[str, Any]) -> None:
        # vLLM closes the update itself when loading fails.
        self._updating = False
        with self._workers() as llm:
            llm.update_weights({"update_info": dict(update_info)})
        self._updating = True

    def weight_receipts(self) -> list[WeightReceipt]:
        """What each worker received so far in the open update; "object_store" only."""
        with self._workers() as llm:
            receipts: list[WeightReceipt] = llm.collective_rpc("weight_receipt")
        return receipts

    def finish_weight_update(self) -> None:
        with self._workers() as llm:
            llm.finish_weight_update()
        self._updating = False
        self.forget_prefixes()

    def close(self) -> None:
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        destroy_model_parallel()
        if self._owns_process_group:
            destroy_distributed_environment()
        gc.collect()

    def _take_exports(self, awaited: set[str]) -> dict[str, Export]:
        exports: dict[str, Export] = {}

        def complete() -> bool:
            exports.update(_joined(self._llm.collective_rpc("take_exports")))
            return awaited <= exports.keys()

        self._step_until(complete)
        # What is still queued holds blocks; a weight update must find all of them free.
        for _ in range(_QUEUED_BATCHES):
            self._llm.llm_engine.step()
        return exports

    def _step_until(self, done: Callable[[], bool]) -> bool:
        """Let vLLM process what it has queued until `done`, at most a few steps; returns whether it is."""
        for _ in range(_DRAIN_STEPS):
            if done():
                return True
            self._llm.llm_engine.step()
        return done()

    @contextmanager
    def _workers(self) -> Iterator[Any]:
        """vLLM's engine, to be called inside the block.

        Raises DeviceLost where a worker that is a process of its own fails or ends: the others have then
        answered a call that this one has not, so the engine cannot be used again.
        """
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        try:
            yield self._llm
        except (RuntimeError, TimeoutError) as error:
            if isinstance(self._llm.llm_engine.model_executor, MultiprocExecutor):
                raise DeviceLost(f"rollout engine: one of its workers failed: {error}") from error
            raise


def _check_engine_args(engine_args: Mapping[str, Any], *, exports: bool) -> None:
    from vllm import EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    for name, value in engine_args.items():
        where = f"rollout.engine_args.{name}"
        if name in _OWN_ARGS:
            raise InputError(f"{where}: the rollout engine sets this itself; remove it")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{where}: vLLM has no such engine argument{hint}")
        if exports and value != _EXPORT_NEEDS.get(name, value):
            raise InputError(
                f"{where}={value!r}: hidden states can be exported with {_EXPORT_NEEDS[name]!r} only; "
                "remove it or set feedback.source=learner"
            )


def _refuse_preemption_that_changes_tokens(config: Any) -> None:
    """Raise InputError where vLLM could preempt a request and then go on with other random numbers.

    vLLM's first model runner draws from a generator that batches under way have already advanced; the second
    draws by seed and position. No request is preempted where the cache holds every running request at its
    longest, and those that finished in the batches under way.
    """
    scheduler, cache = config.scheduler_config, config.cache_config
    if config.use_v2_model_runner or not scheduler.async_scheduling:
        return
    longest = math.ceil(config.model_config.max_model_len / cache.block_size)
    needed = (_QUEUED_BATCHES + 2) * scheduler.max_num_seqs * longest
    if cache.num_gpu_blocks <= needed:
        raise InputError(
            f"rollout.engine_args: vLLM schedules asynchronously with its first model runner, and its cache "
            f"has {cache.num_gpu_blocks} blocks, where more than {needed} would rule out preemption, which "
            "changes sampled tokens; set async_scheduling=false or a smaller max_num_seqs"
        )


def _joined(exports: Sequence[Mapping[str, Export]]) -> dict[str, Export]:
    """One export per request from those of the ranks, each of which has some columns of the states."""
    if len(exports) == 1:
        return dict(exports[0])
    joined = {}
    for name in set.intersection(*(set(part) for part in exports)):
        parts = [part[name] for part in exports]
        source_RT2 = torch.stack([torch.stack((part.token_T, part.position_T), 1) for part in parts])
        # A row is valid only where all ranks computed it from the same token at the same position.
        agreed_T = (source_RT2 == source_RT2[0]).all(2).all(0)
        joined[name] = Export(
            hidden_TP=torch.cat([part.hidden_TP for part in parts], dim=1),
            token_T=torch.where(agreed_T, parts[0].token_T, -1),
            position_T=torch.where(agreed_T, parts[0].position_T, -1),
        )
    return joined


def _sampled(output: Any, export: Export | None) -> Sampled:
    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length"):
        raise RunError(
            f"rollout engine: a request ended with {completion.finish_reason!r}; see vLLM's log above"
        )
    return Sampled(
        token_ids=list(completion.token_ids),
        logprobs=list(completion.logprobs.logprobs),
        truncated=completion.finish_reason == "length",
        export=export,
    )
