"""DeepSpeed around a module: micro-batches summed by hand, one optimizer step, non-finite steps skipped.

The gradient is that of the sum, over micro-batches and ranks, of the losses passed to `ZeroEngine.backward`:
DeepSpeed's own divisions are undone. Stage 0 is fp32 data parallelism, stages 1 to 3 are ZeRO.
"""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from r2m_ray.config.schema import Config
from r2m_ray.engines.faults import reach
from r2m_ray.engines.policy.deepspeed_config import deepspeed_config
from r2m_ray.errors import RunError

WEIGHT = "weight"
STATE = (WEIGHT, "exp_avg", "exp_avg_sq")
"""What Adam's next step depends on, for each parameter, in float32; the step count is the rest."""

DEPRECATED_COLLECTIVE = r".torch\.distributed\.\w+. is deprecated"


def join_group(*, rank: int, world_size: int, device: torch.device, timeout_s: float) -> None:
    """Join the process group of all learner ranks, over gloo on CPUs and NCCL on GPUs.

    Expects MASTER_ADDR and MASTER_PORT in the environment. A process that is already in a group stays in it.
    A collective that waits longer than the timeout raises, which is how a dead rank is noticed.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(device.index or 0)}
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed chooses its accelerator while it is imported.
    import deepspeed

    accelerator = deepspeed.accelerator.get_accelerator().device_name()
    if accelerator != device.type:
        raise RunError(
            f"policy rank {rank}: DeepSpeed was imported for {accelerator} before the learner started on "
            f"{device.type}; set DS_ACCELERATOR={device.type} in the environment of its process"
        )
    # It serves inference alone, and DeepSpeed would compile it for minutes on a machine's first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls these once a parameter, and torch warns once a call.
    warnings.filterwarnings("ignore", DEPRECATED_COLLECTIVE, FutureWarning)
    deepspeed.init_distributed(
        dist_backend="gloo" if device.type == "cpu" else "nccl",
        auto_mpi_discovery=False,
        timeout=datetime.timedelta(seconds=timeout_s),
        rank=rank,
        world_size=world_size,
    )


def total(value: Tensor) -> Tensor:
    """Sum over ranks."""
    dist.all_reduce(value)
    return value


def largest(value: Tensor) -> Tensor:
    """Maximum over ranks."""
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


class ZeroEngine:
    """A module, its AdamW and its learning-rate schedule; every method is called by all ranks alike.

    model: holds the parameters, which keep their names. module: runs forward, and contains the model.
    """

    def __init__(self, module: nn.Module, model: nn.Module, *, config: Config) -> None:
        import deepspeed

        settings = deepspeed_config(config)
        self.stage = int(settings["zero_optimization"]["stage"])
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.parameters = dict(model.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        self.optimizer_steps = 0
        self._peak_rate = config.policy.learning_rate
        self._warmup_steps = config.policy.warmup_steps
        self.grad_norm = 0.0
        """Global gradient norm of the last applied step, before clipping."""
        self._awaits_backward = False
        self._deepspeed = deepspeed
        self._engine: Any = deepspeed.initialize(
            model=module, model_parameters=list(self.parameters.values()), config=settings
        )[0]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that holds the state, inside whatever ZeRO wraps around it."""
        optimizer: torch.optim.Optimizer = self._engine.basic_optimizer
        return optimizer

    @property
    def learning_rate(self) -> float:
        """Of the next step: `peak · min(1, (applied steps + 1) / warm-up steps)`."""
        return self._peak_rate * min(1.0, (self.optimizer_steps + 1) / max(1, self._warmup_steps))

    def forward(self, *inputs: Tensor) -> Any:
        """What the module returns for these inputs."""
        reach("forward")
        return self._engine(*inputs)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside the block forward passes are followed by no backward pass."""
        with torch.no_grad():
            yield
        self._awaits_backward = True

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the loss; `last` marks the step's final micro-batch.

        A non-finite loss makes the gradient non-finite too (the k1 penalty's would not be), so that `step`
        skips it on every rank.
        """
        if last:
            reach("all_reduce")
        self._engine.set_gradient_accumulation_boundary(last)
        scale = self.world_size + 0 * loss.detach()
        self._engine.backward(loss * scale, scale_wrt_gas=False)
        self._awaits_backward = False

    def step(self) -> bool:
        """Clip and apply the gradient; return False, changing nothing, where it is not finite."""
        reach("optimizer")
        self._set_learning_rate(self.learning_rate)
        if self.stage == 0:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if not torch.isfinite(norm):
                self._engine.zero_grad()
                return False
        self._engine.step()
        if self.stage:
            if not self._engine.was_step_applied():
                return False
            norm = self._engine.get_global_grad_norm()
        self.grad_norm = float(norm)
        self.optimizer_steps += 1
        return True

    def create_state(self, loss: Tensor) -> None:
        """Make the optimizer allocate its state, by a step that changes no weight; then count no step.

        loss: any that reaches every parameter. State that exists from the start can be saved before the
        first step and restored into a fresh process alike.
        """
        self.backward(0 * loss, last=True)
        self._set_learning_rate(0.0)
        self._engine.step()
        self.count_steps(0)

    def count_steps(self, steps: int) -> None:
        """Set the number of steps that the schedule and the optimizer's bias correction have seen."""
        self.optimizer_steps = steps
        for state in self.optimizer.state.values():
            if isinstance(state["step"], Tensor):
                state["step"].fill_(steps)
            else:
                state["step"] = steps

    @contextmanager
    def gathered(self, parameter: nn.Parameter, *, modify: bool = False) -> Iterator[None]:
        """Inside the block every rank has the full parameter; with `modify`, rank 0's values are kept."""
        if self.stage < 3:
            yield
            return
        if self._awaits_backward:
            # After a forward pass alone, what ZeRO-3 prefetched for the backward pass is still on its way.
            self._engine.optimizer.empty_partition_cache()
            self._awaits_backward = False
        context = self._deepspeed.zero.GatheredParameters
        with context(parameter, modifier_rank=0 if modify else None):
            yield

    def read_state(self, name: str, kind: str) -> Tensor:
        """One entry of `STATE` of a parameter, float32, of its full shape, on the engine's device."""
        parameter, utils = self.parameters[name], self._deepspeed.utils
        value: Tensor
        if self.stage == 0:
            value = parameter if kind == WEIGHT else self.optimizer.state[parameter][kind]
        elif kind == WEIGHT:
            value = utils.safe_get_full_fp32_param(parameter)
        else:
            value = utils.safe_get_full_optimizer_state(parameter, kind)
        return value.detach()

    @torch.no_grad()
    def write_state(self, name: str, kind: str, value: Tensor) -> None:
        """Set what `read_state` reads; a weight reaches the live parameters too, in their dtype."""
        parameter, utils = self.parameters[name], self._deepspeed.utils
        value = value.to(parameter.device)
        if kind == WEIGHT:
            with self.gathered(parameter, modify=True):
                parameter.copy_(value)
        if self.stage == 3:
            self._write_partition(parameter, kind, value)
        elif self.stage == 0 and kind != WEIGHT:
            self.optimizer.state[parameter][kind].copy_(value)
        elif self.stage and kind == WEIGHT:
            utils.safe_set_full_fp32_param(parameter, value)
        elif self.stage:
            utils.safe_set_full_optimizer_state(parameter, value, kind)

    def _write_partition(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        # The setters of full ZeRO-3 tensors fail where the ranks do not divide the size: the last
        # partition is padded.
        utils = self._deepspeed.utils
        if kind == WEIGHT:
            partition = utils.safe_get_local_fp32_param(parameter)
        else:
            partition = utils.safe_get_local_optimizer_state(parameter, kind)
        piece = torch.zeros_like(partition)
        mine = value.flatten()[self.rank * piece.numel() :][: piece.numel()]
        piece[: mine.numel()] = mine
        if kind == WEIGHT:
            utils.safe_set_local_fp32_param(parameter, piece)
        else:
            utils.safe_set_local_optimizer_state(parameter, piece, kind)

    def _set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
