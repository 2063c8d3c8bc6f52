"""The rollout engine: vLLM samples trajectories and hands over the hidden states it computed anyway.

One engine lives in one process, without vLLM's own background process. Every row is its own request
with its own seed, so its tokens depend neither on the batch it is sampled in nor on the engine that
samples it. Weights arrive through vLLM's weight-transfer interface; an engine whose weights are not
one complete version is quarantined and refuses to sample.

Axes: N rows, T packed tokens, P policy width.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from r2m_ray.core.batch import Hidden, Prompt, RowText, SamplePlan, Trajectories, pack_rows
from r2m_ray.engines.device_loss import raises_device_loss
from r2m_ray.engines.rollout.vllm_engine import OBJECT_STORE, Request, Sampled, VLLMEngine
from r2m_ray.engines.text import policy_prompt_ids
from r2m_ray.engines.weights import WeightBucket
from r2m_ray.errors import InputError, RunError


@dataclass(frozen=True, slots=True)
class _Update:
    """A weight update under way: whether it is hashed, and the parameters still to come."""

    verified: bool
    outstanding: dict[str, tuple[int, ...]]


@raises_device_loss("rollout engine")
class RolloutEngine:
    """Samples shards with the current weights, and exports the policy's hidden states.

    Args:
        model_dir: Hugging Face directory of the policy and its tokenizer; its weights are version 0.
        dtype: "float32" or "bfloat16", of the weights, the KV cache and the exported states.
        seed: of the engine; rows are seeded by their plan.
        max_model_len: tokens of prompt and response together.
        export_hidden: whether to export hidden states; otherwise they have width 0 and cost nothing.
        engine_args: further ``vllm.EngineArgs``.
        weight_backend: vLLM weight-transfer engine: "object_store" takes buckets, on any device; vLLM's own
            "nccl" and "ipc" bring weights themselves (``init_weight_transfer``, ``receive_weights``).

    The export takes a share of the memory for keys and values: for each cached token, 16 bytes and the
    token's hidden state, of which every tensor parallel rank keeps its own columns.

    Raises:
        InputError: for engine arguments that vLLM does not have, that this class sets itself, or that the
            export cannot be combined with, and for a vLLM version that the engine was not tested with.
        DeviceLost: by every method, where a device or a worker process failed.
    """

    def __init__(
        self,
        *,
        model_dir: str,
        dtype: str,
        seed: int,
        max_model_len: int,
        export_hidden: bool,
        engine_args: Mapping[str, Any],
        weight_backend: str = OBJECT_STORE,
    ) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        self._stop_token_ids = _stop_token_ids(model_dir, self._tokenizer)
        self._parameters = _parameter_shapes(model_dir)
        self._max_model_len = max_model_len
        self._exports = export_hidden
        self._backend = weight_backend
        self._version = 0
        self._update: _Update | None = None
        self._quarantined = False
        self._totals = {"sampled_tokens": 0, "sample_seconds": 0.0, "regenerated_rows": 0, "sync_bytes": 0}
        self._vllm = VLLMEngine(
            {"model": model_dir, "dtype": dtype, "seed": seed, "max_model_len": max_model_len},
            engine_args,
            export_hidden=export_hidden,
            weight_backend=weight_backend,
        )
        # The first batch compiles and allocates; it has random and greedy rows, as later ones may.
        self._generate([Request([0], seed, temperature, 2, ()) for temperature in (1.0, 0.0, 1.0)])

    @property
    def version(self) -> int:
        """Version of the weights; every batch is stamped with it."""
        return self._version

    def stats(self) -> dict[str, float]:
        """Totals since the start: tokens sampled, seconds spent on it, rows regenerated, bytes received."""
        return dict(self._totals)

    def sample(self, plans: Sequence[SamplePlan]) -> list[tuple[Trajectories, Hidden]]:
        """Sample every plan, all in one batch.

        Rows are drawn from softmax(logits/temperature), untruncated, and ``rollout_logp_T`` holds its
        log-probs; those of greedy rows are at temperature 1. A response keeps its end token, and is
        truncated where it has none.

        Returns:
            The records of each plan (shard): hidden_TP in the engine's dtype, [T, 0] without export.

        Raises:
            InputError: for a prompt that is empty or too long.
            RunError: while quarantined, and when hidden states are missing or wrong twice.
        """
        if self._quarantined:
            raise RunError(
                "rollout engine: its last weight update did not complete, so it holds no version of the "
                "policy; send a complete update before sampling"
            )
        start = time.perf_counter()
        prompt_ids = [[self._encode(prompt, plan) for prompt in plan.prompts] for plan in plans]
        requests = [r for plan, ids in zip(plans, prompt_ids, strict=True) for r in self._requests(plan, ids)]
        sampled = iter(self._generate(requests))
        shards = [self._pack(plan, ids, sampled) for plan, ids in zip(plans, prompt_ids, strict=True)]
        self._totals["sample_seconds"] += time.perf_counter() - start
        self._totals["sampled_tokens"] += sum(int(t.action_T.sum()) for t, _ in shards)
        return shards

    def texts(self, trajectories: Trajectories, rows: int) -> list[RowText]:
        """The first ``rows`` rows of a shard in words, with the text of each input token."""
        found = zip(trajectories.row_prompts, trajectories.responses, strict=True)
        texts = []
        for n, (prompt, response) in enumerate(islice(found, rows)):
            ids = trajectories.input_T[trajectories.layout.slice_of(n)].tolist()
            tokens = tuple(self._tokenizer.decode([token]) for token in ids)
            texts.append(RowText(prompt=prompt, response=response, tokens=tokens))
        return texts

    def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        """Join the trainer's transfer group, with the ``init_info`` of the weight backend."""
        self._vllm.init_weight_transfer(init_info)

    def begin_weight_update(self, *, verify: bool = True) -> None:
        """Open an update, and quarantine the engine until it is finished; ``verify`` hashes what arrives."""
        self._quarantined = True
        self._update = None
        self._vllm.begin_weight_update()
        self._update = _Update(verified=verify, outstanding=dict(self._parameters))

    def load_bucket(self, bucket: WeightBucket) -> None:
        """Load one bucket into the open update; RunError for a parameter that the policy does not await."""
        update = self._take_update()
        for name, shape in zip(bucket.names, bucket.shapes, strict=True):
            expected = update.outstanding.pop(name, None)
            if expected != shape:
                reason = "unknown or sent twice" if expected is None else f"{list(expected)} was expected"
                raise RunError(f"rollout engine: weight {name} {list(shape)} refused: {reason}")
        self._vllm.load({"bucket": bucket, "hashed": update.verified})
        self._update = update

    def receive_weights(self, update_info: Mapping[str, Any]) -> None:
        """Pass one ``update_info`` to a weight backend that brings the weights itself."""
        update = self._take_update()
        self._vllm.load(update_info)
        self._update = update

    def finish_weight_update(self, *, version: int, digest: str | None) -> None:
        """Close the update; from now on the engine samples ``version``.

        Args:
            version: the training step whose weights these are.
            digest: sha256 that the sender computed over the buckets (``WeightDigest``); None is not compared.

        Raises:
            RunError: if a parameter is missing or the digest differs; the engine stays quarantined.
        """
        update = self._take_update()
        if self._backend == OBJECT_STORE:
            self._check(update, digest)
        elif digest is not None:
            raise InputError(
                f"sync.backend={self._backend} has no digest; verify with sync.backend=object_store"
            )
        self._vllm.finish_weight_update()
        self._version = version
        self._quarantined = False

    def close(self) -> None:
        """Stop the engine and free its memory; it cannot be used afterwards."""
        self._quarantined = True
        self._vllm.close()

    def _take_update(self) -> _Update:
        # Whoever fails does not put it back: a broken update cannot be continued, only begun again.
        update, self._update = self._update, None
        if update is None:
            raise RunError("rollout engine: no weight update is open; call begin_weight_update first")
        return update

    def _check(self, update: _Update, digest: str | None) -> None:
        receipts = self._vllm.weight_receipts()
        self._totals["sync_bytes"] += receipts[0].nbytes
        missing = [*update.outstanding, *(name for receipt in receipts for name in receipt.missing)]
        if missing:
            raise RunError(
                f"rollout engine: the weight update lacks {len(missing)} parameters, one is {missing[0]}; "
                "send every parameter of the policy"
            )
        if digest is None:
            return
        if not update.verified:
            raise RunError("rollout engine: a digest is compared only after begin_weight_update(verify=True)")
        for receipt in receipts:
            if receipt.digest != digest:
                raise RunError(
                    f"rollout engine: weights sent with sha256 {digest} arrived with {receipt.digest}; "
                    "send a complete update again"
                )

    def _encode(self, prompt: Prompt, plan: SamplePlan) -> list[int]:
        ids = policy_prompt_ids(self._tokenizer, prompt.text)
        room = self._max_model_len - plan.max_new_tokens
        if not 0 < len(ids) <= room:
            raise InputError(
                f"prompt {prompt.index} has {len(ids)} tokens, where 1 to {room} leave room for "
                f"{plan.max_new_tokens} new ones; drop it or raise task.max_prompt_tokens"
            )
        return ids

    def _requests(self, plan: SamplePlan, prompt_ids: Sequence[list[int]]) -> Iterator[Request]:
        if 0 < plan.temperature < 0.01:
            raise InputError(
                f"algo.temperature={plan.temperature}: vLLM samples at 0 (greedy) or from 0.01 up"
            )
        for prompt, ids in zip(plan.prompts, prompt_ids, strict=True):
            for row in range(plan.group_size):
                yield Request(
                    prompt_ids=ids,
                    seed=row_seed(plan.seed, plan.step, prompt.index, row),
                    temperature=0.0 if plan.greedy_first and row == 0 else plan.temperature,
                    max_new_tokens=plan.max_new_tokens,
                    stop_token_ids=self._stop_token_ids,
                )

    def _generate(self, requests: Sequence[Request]) -> list[Sampled]:
        """Samples whose hidden states are proven to be theirs; a row that fails is sampled once more."""
        sampled = self._vllm.generate(requests)
        faulty = list(_faults(requests, sampled)) if self._exports else []
        if faulty:
            self._totals["regenerated_rows"] += len(faulty)
            # The fault may lie in a cached prefix, where it would be met again.
            self._vllm.forget_prefixes()
            again = self._vllm.generate([requests[n] for n, _ in faulty])
            for (n, _), row in zip(faulty, again, strict=True):
                sampled[n] = row
            for n, fault in _faults(requests, sampled):
                raise RunError(f"rollout engine: hidden states of row {n} {fault}, twice; restart the engine")
        return sampled

    def _pack(
        self, plan: SamplePlan, prompt_ids: Sequence[list[int]], sampled: Iterator[Sampled]
    ) -> tuple[Trajectories, Hidden]:
        rows = [next(sampled) for _ in range(len(plan.prompts) * plan.group_size)]
        trajectories = pack_rows(
            [prompt.text for prompt in plan.prompts],
            prompt_ids,
            [row.token_ids for row in rows],
            self._tokenizer.batch_decode([row.token_ids for row in rows], skip_special_tokens=True),
            logprobs=[row.logprobs for row in rows],
            truncated=[row.truncated for row in rows],
            version=self._version,
        )
        exports = [row.export.hidden_TP for row in rows if row.export is not None]
        hidden_TP = torch.cat(exports) if exports else torch.empty(trajectories.layout.tokens, 0)
        return trajectories, Hidden(layout=trajectories.layout, hidden_TP=hidden_TP)


def row_seed(seed: int, step: int, prompt: int, row: int) -> int:
    """Seed of one row: 63 bits of BLAKE2b over (seed, step, prompt index, row), each a 64-bit integer."""
    digest = hashlib.blake2b(struct.pack("<4q", seed, step, prompt, row), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _stop_token_ids(model_dir: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of every end token: the tokenizer's, and all that the generation config names.

    Raises InputError where neither names one: no response could ever end.
    """
    configured = GenerationConfig.from_pretrained(model_dir).eos_token_id
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    if not ids:
        raise InputError(
            f"model.policy {model_dir}: neither its tokenizer nor its generation config names an end token; "
            "set eos_token_id in one of them"
        )
    return tuple(sorted(ids))


def _parameter_shapes(model_dir: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the causal language model; tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        )
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _faults(requests: Sequence[Request], sampled: Sequence[Sampled]) -> Iterator[tuple[int, str]]:
    """Rows whose hidden states are wrong, and what is wrong with them."""
    for n, (request, row) in enumerate(zip(requests, sampled, strict=True)):
        input_T = torch.tensor([*request.prompt_ids, *row.token_ids][:-1])
        if row.export is None:
            yield n, "are missing"
        elif len(row.export.hidden_TP) != len(input_T):
            yield n, f"have {len(row.export.hidden_TP)} rows for {len(input_T)} tokens"
        elif not torch.equal(row.export.token_T, input_T):
            yield n, "belong to other tokens"
        elif not torch.equal(row.export.position_T, torch.arange(len(input_T))):
            yield n, "belong to other positions"
