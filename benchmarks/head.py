"""The R2M head against the literal cross-attention of Eq. 3: forward and backward, alternating in one run.

    python benchmarks/head.py --widths 1024 4096 --repeats 5 --out head.json

Both sides get the same hidden states and parameters and compute the reward of every row and the
gradients of all parameters. The literal side forms K and V of all packed tokens in one product
each (its fastest form), then attends row by row.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import measure
import torch
from torch import Tensor

from r2m_ray.core.head import R2MHead

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One width's inputs: the head, reward embeddings, hidden states and offsets."""

    head: R2MHead
    rte_ND: Tensor
    hidden_TP: Tensor
    offsets: Tensor


def random_case(width: int, arguments: argparse.Namespace) -> Case:
    """Rows of between half and all of `tokens` states; policy, reward and attention share the width."""
    generator = torch.Generator().manual_seed(0)
    low = arguments.tokens // 2
    lengths = torch.randint(low, arguments.tokens + 1, (arguments.rows,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    score_weight = torch.randn(width, generator=generator) / math.sqrt(width)
    head = R2MHead(width, width, width, score_weight, init_std=1.3 / math.sqrt(width), generator=generator)
    hidden_TP = torch.randn(int(offsets[-1]), width, generator=generator)
    return Case(
        head=head.to(arguments.device),
        rte_ND=torch.randn(arguments.rows, width, generator=generator).to(arguments.device),
        hidden_TP=hidden_TP.to(arguments.device, DTYPES[arguments.dtype]),
        offsets=offsets.to(arguments.device),
    )


def literal_cross_attention(case: Case) -> Tensor:
    """Ĥ as Eq. 3 writes it: `softmax(q (h W_k)ᵀ / √E) (h W_v) W_o`, keys and values formed."""
    head, bounds = case.head, case.offsets.tolist()
    query_NE = case.rte_ND @ head.w_q
    states_TP = case.hidden_TP.to(query_NE.dtype)
    key_TE, value_TE = states_TP @ head.w_k, states_TP @ head.w_v
    rows = []
    for row, start, stop in zip(range(len(bounds) - 1), bounds[:-1], bounds[1:], strict=True):
        score_S = key_TE[start:stop] @ query_NE[row] / math.sqrt(query_NE.shape[1])
        rows.append(torch.softmax(score_S, 0) @ value_TE[start:stop])
    return torch.stack(rows) @ head.w_o


def sides(case: Case, omega: float) -> dict[str, Callable[[], None]]:
    """Forward and backward of both forms; each leaves its gradients in the head."""
    head = case.head

    def ours() -> None:
        head.zero_grad()
        reward_N = head.forward(case.rte_ND, case.hidden_TP, case.offsets, omega)
        torch.autograd.backward(reward_N.square().sum())

    def literal() -> None:
        head.zero_grad()
        reward_N = head.score((1 - omega) * literal_cross_attention(case) + omega * case.rte_ND)
        torch.autograd.backward(reward_N.square().sum())

    return {"r2m_head": ours, "literal": literal}


def kept_bytes(function: Callable[[], object], case: Case) -> int:
    """Bytes that the forward pass keeps for the backward one, beyond its inputs and parameters."""
    inputs = (case.rte_ND, case.hidden_TP, case.offsets, *case.head.parameters())
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(size for pointer, size in storages.items() if pointer not in given)


def operations(function: Callable[[], object]) -> int:
    """Operations of torch in one call; on a GPU each costs at least one kernel launch."""
    with torch.profiler.profile() as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


def compared(width: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times, kept memory and agreement of both sides at one width."""
    case = random_case(width, arguments)
    functions = sides(case, omega=0.6)
    kept, values = {}, {}
    for name, function in functions.items():
        kept[name] = kept_bytes(function, case)
        values[name] = torch.cat([p.grad.flatten() for p in case.head.parameters() if p.grad is not None])
    times = measure.alternating(functions, arguments.repeats, warmup=0)
    ratios = [slow / fast for slow, fast in zip(times["literal"], times["r2m_head"], strict=True)]
    return {
        "width": width,
        "rows": arguments.rows,
        "tokens": case.hidden_TP.shape[0],
        "seconds": {name: measure.summary(times[name]) for name in functions},
        "speedup": measure.summary(ratios),
        "kept_for_backward_bytes": kept,
        "operations": {name: operations(function) for name, function in functions.items()},
        "gradient_relative_difference": relative(values["r2m_head"], values["literal"]),
    }


def relative(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the expected norm."""
    return float(torch.dist(value, expected) / expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="states of the longest row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the states")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="head.json")
    arguments = parser.parse_args()
    result = {
        "benchmark": "head",
        "settings": vars(arguments),
        "machine": measure.machine(),
        "cases": [compared(width, arguments) for width in arguments.widths],
    }
    measure.write(arguments.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
