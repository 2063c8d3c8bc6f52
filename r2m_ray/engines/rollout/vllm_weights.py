"""vLLM's weight-transfer engine "object_store": takes weights as buckets of named tensors.

It is the generic path, for every device; vLLM's own engines ("nccl", "ipc") are chosen by name
instead. Importing this module registers it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from r2m_ray.engines.rollout.vllm_engine import OBJECT_STORE, WeightReceipt
from r2m_ray.engines.weights import WeightBucket, WeightDigest


@dataclass(frozen=True, slots=True)
class ObjectStoreInit:
    """Nothing to agree on beforehand."""


@dataclass(frozen=True, slots=True)
class ObjectStoreUpdate:
    """One bucket, and whether it enters the digest."""

    bucket: WeightBucket
    hashed: bool


class ObjectStoreWeightEngine(WeightTransferEngine):  # type: ignore[misc]
    """Loads buckets in checkpoint format, layer by layer, into a running model."""

    init_info_cls = ObjectStoreInit
    update_info_cls = ObjectStoreUpdate

    _open = False

    def init_transfer_engine(self, init_info: ObjectStoreInit) -> None:
        return

    def start_weight_update(self) -> None:
        if self._open:
            # An abandoned update leaves layers half loaded, and would mix with the next one.
            self.finish_weight_update()
        self._expected = {name for name, _ in self.model.named_parameters()}
        self._loaded: set[str] = set()
        self._digest = WeightDigest()
        self._hashed = False
        self._nbytes = 0
        initialize_layerwise_reload(self.model)
        self._open = True

    def receive_weights(self, update_info: ObjectStoreUpdate) -> None:
        bucket = update_info.bucket
        if update_info.hashed:
            self._digest.update(bucket)
            self._hashed = True
        self._nbytes += bucket.data.numel()
        self._loaded |= self.model.load_weights(bucket.tensors())

    def receipt(self) -> WeightReceipt:
        # A quantized model has scales that no checkpoint carries.
        checked = self.model_config.quantization is None
        return WeightReceipt(
            digest=self._digest.hexdigest() if self._hashed else "",
            missing=tuple(sorted(self._expected - self._loaded)) if checked else (),
            nbytes=self._nbytes,
        )

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _process_tied_embeddings(self.model)
        self._open = False

    def shutdown(self) -> None:
        return


def _process_tied_embeddings(model: nn.Module) -> None:
    """Renew what vLLM derives from an embedding for every further layer that shares it.

    Reloading processes a layer when its own weights arrive, and a tied output layer has none: on a CPU it
    would go on using a packed copy of the old embedding.
    """
    seen: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding):
            if id(layer.weight) in seen:
                layer.quant_method.process_weights_after_loading(layer)
            seen.add(id(layer.weight))


WeightTransferEngineFactory.register_engine(OBJECT_STORE, ObjectStoreWeightEngine)

# At every update it warns of layers that own no weight; what really is missing is in the receipt.
logging.getLogger(finalize_layerwise_reload.__module__).setLevel(logging.ERROR)
