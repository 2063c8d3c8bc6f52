"""What runs inside a vLLM worker: the export of hidden states, at no extra forward pass.

Every token that vLLM computes owns a slot of the paged KV cache. A side buffer with the same slots keeps the
token's hidden state, so paging, prefix sharing, chunked prefill and preemption are right for the hidden
states whenever they are right for the keys and values. The worker copies the model's output into the buffer
after each forward pass; the KV connector learns from the scheduler which blocks a finished request owned,
keeps them until it has read the request's rows in the next step, and a worker call hands the rows out.

Each slot also remembers which token at which position wrote it, which proves that a row is complete and the
request's own.

Axes: T tokens of one forward pass or one request, P policy width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from r2m_ray.engines.faults import reach
from r2m_ray.engines.hardware import host_buffer, wait_for_copies
from r2m_ray.engines.rollout import vllm_weights  # noqa: F401  registers the weight-transfer engine
from r2m_ray.engines.rollout.vllm_engine import Export, WeightReceipt
from r2m_ray.errors import InputError

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

READ_TOKENS = 8192
"""Tokens that leave the buffer at a time, so that reading needs little memory beside it."""

SOURCE_BYTES = 16
"""Token and position of a slot, both int64."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished request, its input tokens and the blocks that hold them."""

    request_id: str
    tokens: int
    block_ids: tuple[int, ...]


class HiddenBuffer:
    """Hidden state, token and position of every slot of the KV cache."""

    def __init__(self, *, blocks: int, block_size: int) -> None:
        self._slots = blocks * block_size
        self._block_size = block_size
        self._hidden: Tensor | None = None
        self._source: Tensor | None = None

    def write(self, slot_T: Tensor, hidden_TP: Tensor, token_T: Tensor, position_T: Tensor) -> None:
        """Store one forward pass; slots below 0 are padding, and so is whatever lies beyond slot_T."""
        if self._hidden is None or self._source is None:
            # One row more than there are slots takes the padding: dropping it would need its count,
            # which on an accelerator waits for the device.
            self._hidden = hidden_TP.new_empty(self._slots + 1, hidden_TP.shape[1])
            self._source = token_T.new_full((self._slots + 1, 2), -1, dtype=torch.int64)
        tokens = min(slot_T.numel(), hidden_TP.shape[0])
        slot_T = slot_T[:tokens].to(torch.int64)
        slot_T = torch.where(slot_T < 0, self._slots, slot_T)
        self._hidden.index_copy_(0, slot_T, hidden_TP[:tokens])
        source = torch.stack((token_T[:tokens], position_T[:tokens]), dim=1)
        self._source.index_copy_(0, slot_T, source.to(torch.int64))

    def read(self, requests: Sequence[Finished]) -> dict[str, Export]:
        """The rows of finished requests, by request id."""
        if self._hidden is None or self._source is None or not requests:
            return {}
        offsets = torch.arange(self._block_size)
        slots = [
            (torch.tensor(r.block_ids)[:, None] * self._block_size + offsets).view(-1)[: r.tokens]
            for r in requests
        ]
        sizes = [slot_T.numel() for slot_T in slots]
        slot_T = torch.cat(slots)
        device = self._hidden.device
        hidden_TP = host_buffer((len(slot_T), self._hidden.shape[1]), self._hidden.dtype, device)
        source_T2 = host_buffer((len(slot_T), 2), torch.int64, device)
        for start in range(0, len(slot_T), READ_TOKENS):
            part = slice(start, start + READ_TOKENS)
            device_slot_T = slot_T[part].to(device)
            hidden_TP[part].copy_(self._hidden.index_select(0, device_slot_T), non_blocking=True)
            source_T2[part].copy_(self._source.index_select(0, device_slot_T), non_blocking=True)
        wait_for_copies(device)
        return {
            r.request_id: Export(h, s[:, 0], s[:, 1])
            for r, h, s in zip(requests, hidden_TP.split(sizes), source_T2.split(sizes), strict=True)
        }

    def forget(self) -> None:
        """Mark every row as unwritten, so that none outlives the weights it was computed with."""
        if self._source is not None:
            # The engine allocated it in inference mode, and only there may it be written.
            with torch.inference_mode():
                self._source.fill_(-1)


class FinishedRequests(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler sends to the worker: requests that finished since the last step."""

    def __init__(self, requests: tuple[Finished, ...]) -> None:
        self.requests = requests


class HiddenStatesConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """A KV connector that transfers no keys and values, only holds blocks until their rows are read."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
            kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
            raise InputError(
                f"model.policy: hidden states can be exported from models with full attention in every "
                f"layer, this one caches {kinds}; set feedback.source=learner"
            )
        self._pending: list[Finished] = []
        self._exports: dict[str, Export] = {}
        self.buffer = HiddenBuffer(
            blocks=kv_cache_config.num_blocks, block_size=groups[0].kv_cache_spec.block_size
        )

    # Scheduler side.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        return

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any]]:
        # The last token was sampled, never computed.
        finished = Finished(request.request_id, request.num_tokens - 1, tuple(block_ids))
        self._pending.append(finished)
        return True, {"request_id": finished.request_id}

    def build_connector_meta(self, scheduler_output: Any) -> FinishedRequests:
        metadata = FinishedRequests(tuple(self._pending))
        self._pending.clear()
        return metadata

    # Worker side.

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], None]:
        requests: tuple[Finished, ...] = self._get_connector_metadata().requests
        self._exports |= self.buffer.read(requests)
        return {request.request_id for request in requests}, None

    def take_exports(self) -> dict[str, Export]:
        """Every export since the last call."""
        exports, self._exports = self._exports, {}
        return exports


class RolloutWorker(PlatformWorker):  # type: ignore[misc]
    """The platform's worker, with the export of hidden states and other calls of a rollout engine."""

    def init_device(self) -> None:
        """vLLM's own, with no compilation on a CPU where ``enforce_eager`` asks for none."""
        if current_platform.is_cpu() and self.model_config.enforce_eager:
            # Even then vLLM compiles how it ranks tokens, which takes longer than it ever saves here.
            torch.compiler.set_stance("force_eager")
        super().init_device()

    def determine_available_memory(self) -> int:
        """Bytes for keys and values: vLLM's own number without the share that the side buffer takes."""
        available: int = super().determine_available_memory()
        if self.vllm_config.kv_transfer_config is None:
            return available
        specs = self.get_kv_cache_spec().values()
        cached = sum(spec.page_size_bytes / spec.block_size for spec in specs)
        columns = self._columns()
        exported = (columns.stop - columns.start) * self.model_config.dtype.itemsize + SOURCE_BYTES
        return int(available * cached / (cached + exported))

    def export_hidden(self) -> None:
        """Keep the hidden state of every token from now on, after the final norm.

        With tensor parallelism every rank computes all columns, and keeps its own share of them.
        """
        buffer: HiddenBuffer = get_kv_transfer_group().buffer
        runner = self.model_runner
        columns = self._columns()

        def keep(slots: Any, hidden_TP: Tensor, token_T: Tensor, position_T: Tensor) -> None:
            # One cache group: every layer has the same slots.
            slot_T = next(iter(slots.values()))
            buffer.write(slot_T, hidden_TP[:, columns], token_T, position_T)

        if self.use_v2_model_runner:
            sample = runner.sample_tokens

            def keep_and_sample(grammar_output: Any) -> Any:
                state = runner.execute_model_state
                if state is not None:
                    batch = state.input_batch
                    keep(state.slot_mappings_by_layer, state.hidden_states, batch.input_ids, batch.positions)
                return sample(grammar_output)

            runner.sample_tokens = keep_and_sample
        else:
            forward = runner._model_forward

            def forward_and_keep(input_ids: Tensor, positions: Tensor, **inputs: Any) -> Any:
                reach("mid_generate")
                hidden_TP = forward(input_ids=input_ids, positions=positions, **inputs)
                keep(get_forward_context().slot_mapping, hidden_TP, input_ids, positions)
                return hidden_TP

            runner._model_forward = forward_and_keep

    def keep_generators(self) -> None:
        """Let vLLM read the prompt of a seeded request in several steps on a CPU.

        After each of them vLLM draws a token, discards it and rewinds the request's generator, which CPU
        generators refuse. A generator that is out of sight during the draw needs no rewinding.
        """
        runner = self.model_runner
        sample = runner.sample_tokens

        def sample_without(grammar_output: Any) -> Any:
            batch = runner.input_batch
            reading = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
            kept = {n: batch.generators.pop(n) for n in reading if n in batch.generators}
            try:
                return sample(grammar_output)
            finally:
                batch.generators.update(kept)

        runner.sample_tokens = sample_without

    def take_exports(self) -> Mapping[str, Export]:
        """The hidden states of the requests that finished since the last call, by request id."""
        exports: Mapping[str, Export] = get_kv_transfer_group().take_exports()
        if self.parallel_config.world_size == 1:
            return exports
        # To another process a view is sent with all of its storage.
        return {
            name: Export(e.hidden_TP.clone(), e.token_T.clone(), e.position_T.clone())
            for name, e in exports.items()
        }

    def forget_hidden(self) -> None:
        """Invalidate every row of the buffer."""
        get_kv_transfer_group().buffer.forget()

    def weight_receipt(self) -> WeightReceipt:
        """What the open weight update has brought so far."""
        receipt: WeightReceipt = self.weight_transfer_engine.receipt()
        return receipt

    def _columns(self) -> slice:
        """The columns of the hidden state that this rank keeps."""
        width = self.model_config.get_hidden_size()
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        return slice(rank * width // ranks, (rank + 1) * width // ranks)
