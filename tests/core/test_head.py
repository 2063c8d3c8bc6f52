from __future__ import annotations

import math

import pytest
import torch
from heads import CROSS_ATTENTION, D, P, gradients, head, literal_equation_3, packed, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from r2m_ray.core.head import attention, omega


def test_omega_by_hand() -> None:
    assert [omega(t, 4, 0.0) for t in range(5)] == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=5e-7)
    assert [omega(t, 4, 0.6) for t in range(1, 5)] == pytest.approx([0.853553, 0.6, 0.6, 0.6], abs=5e-7)


def test_omega_of_a_paper_length_run() -> None:
    weights = [omega(t, 100, 0.7) for t in range(1, 101)]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] == pytest.approx(0.999753, abs=5e-7)
    # cos(π t/T) = 0.4 at t/T = 0.369: the floor holds from step 37 on.
    assert [weights.index(0.7) + 1, weights[-1]] == [37, 0.7]


def test_omega_of_the_original_reward_model_is_exactly_one() -> None:
    assert {omega(t, 7, 1.0) for t in range(8)} == {1.0}


@pytest.mark.parametrize(("step", "total", "floor"), [(-1, 4, 0.5), (5, 4, 0.5), (0, 0, 0.5), (1, 4, 1.1)])
def test_omega_refuses_what_is_no_schedule(step: int, total: int, floor: float) -> None:
    with pytest.raises(ValueError, match=r"outside 0 … total_steps|must be in \[0, 1\]"):
        omega(step, total, floor)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    weight=st.sampled_from([0.0, 0.3, 0.6, 0.999]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_head_is_equation_3_and_4_with_all_gradients(
    lengths: list[int], weight: float, bias: bool, seed: int
) -> None:
    module, offsets = head(bias=bias).double(), packed(lengths)
    rte_ND = random(len(lengths), D, seed=seed).double()
    hidden_TP = 2 * random(sum(lengths), P, seed=seed + 1).double()
    upstream_N = random(len(lengths), seed=seed + 2).double()

    reward_N = module(rte_ND, hidden_TP, offsets, weight)
    torch.autograd.backward((reward_N * upstream_N).sum())
    actual = gradients(module)

    module.zero_grad()
    final_ND = (1 - weight) * literal_equation_3(module, rte_ND, hidden_TP, offsets) + weight * rte_ND
    literal_N = nn.functional.linear(final_ND, module.score_weight[None], module.score_bias)[:, 0]
    torch.autograd.backward((literal_N * upstream_N).sum())

    def relative(value: Tensor | None, expected: Tensor | None) -> float:
        assert value is not None
        assert expected is not None
        return float(torch.dist(value, expected).item() / max(expected.norm().item(), 1e-6))

    assert relative(reward_N, literal_N) < 1e-12
    for name, expected in gradients(module).items():
        assert relative(actual[name], expected) < 1e-12, name


def test_attend_gradcheck() -> None:
    hidden_TP = random(9, 4).double()
    offsets = packed([3, 0, 1, 5])
    u_NP = random(4, 4, seed=1).double().requires_grad_()
    module = head(4)
    assert torch.autograd.gradcheck(lambda u: module.attend(u, hidden_TP, offsets), (u_NP,))


def test_rows_without_states_have_no_feedback() -> None:
    module = head()
    context_NP = module.attend(random(3, P), random(4, P, seed=1), packed([3, 0, 1]))
    assert context_NP[1].count_nonzero() == 0
    assert context_NP[0].count_nonzero() == P
    torch.testing.assert_close(context_NP[2], random(4, P, seed=1)[3])


@pytest.mark.parametrize("width", [64, 96, 1024])
def test_a_row_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    # The rows of 33 to 48 states are attended to together, in blocks of two.
    monkeypatch.setattr("r2m_ray.core.head.STATES_AT_ONCE_ON_CPU", 2 * 48 * width)
    lengths = [5, 40, 1, 33, 17, 48, 41]
    offsets, u_NP, hidden_TP = packed(lengths), random(7, width) / 8, random(185, width, seed=1)
    weight_T, context_NP = attention(u_NP, hidden_TP, offsets)
    for row, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        alone = attention(u_NP[row : row + 1].clone(), hidden_TP[start:stop].clone(), packed([stop - start]))
        assert torch.equal(alone[0], weight_T[start:stop])
        assert torch.equal(alone[1][0], context_NP[row])


def test_blocks_of_rows_equal_a_loop_over_rows() -> None:
    """Forward and backward; the products of a row are the same ones, summed in another order."""
    lengths = [*range(40), 100, 300]
    offsets, u_NP, hidden_TP = packed(lengths), random(42, 64) / 8, random(sum(lengths), 64, seed=1)
    grad_NP = random(42, 64, seed=2)
    u_NP.requires_grad_()
    context_NP = head(64).attend(u_NP, hidden_TP, offsets)
    (grad_u_NP,) = torch.autograd.grad(context_NP, u_NP, grad_NP)
    for row, states in enumerate(torch.split(hidden_TP, lengths)):
        query = u_NP[row].detach().requires_grad_()
        expected = torch.softmax(states @ query, 0) @ states
        (grad_u,) = torch.autograd.grad(expected, query, grad_NP[row])
        torch.testing.assert_close(context_NP[row], expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(grad_u_NP[row], grad_u, atol=1e-5, rtol=1e-6)


def test_the_number_of_operations_does_not_grow_with_the_rows() -> None:
    def operations(rows: int) -> int:
        lengths = [33 + n % 16 for n in range(rows)]
        inputs = random(rows, 64) / 8, random(sum(lengths), 64, seed=1), packed(lengths)
        with torch.profiler.profile() as profile:
            attention(*inputs)
        return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))

    assert operations(200) == operations(10)


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    lengths = [20, 18, 30]
    u_NP, hidden_TP = random(3, 64) / 8, random(68, 64, seed=1)
    _, expected_NP = attention(u_NP, hidden_TP, packed(lengths))
    hidden_TP[20:38] = torch.nan
    _, context_NP = attention(u_NP, hidden_TP, packed(lengths))
    assert torch.isnan(context_NP[1]).all()
    assert torch.equal(context_NP[[0, 2]], expected_NP[[0, 2]])


def test_scores_far_apart_pick_one_state() -> None:
    hidden_TP = torch.eye(3) * 1e4
    u_NP = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    context_NP = head(3).attend(u_NP, hidden_TP, packed([3]))
    assert context_NP.tolist() == [[1e4, 0, 0]]
    assert torch.autograd.grad(context_NP.sum(), u_NP)[0].tolist() == [[0, 0, 0]]


def test_bfloat16_states_are_read_in_float32() -> None:
    module, offsets = head(64, 48, 32, std=0.16), packed([30, 50])
    rte_ND, hidden_TP = random(2, 48), random(80, 64, seed=1).bfloat16()
    reward_N = module(rte_ND, hidden_TP, offsets, 0.6)
    assert reward_N.dtype == torch.float32
    assert torch.equal(reward_N, module(rte_ND, hidden_TP.float(), offsets, 0.6))
    assert torch.equal(
        module(rte_ND.bfloat16(), hidden_TP, offsets, 0.6),
        module(rte_ND.bfloat16().float(), hidden_TP, offsets, 0.6),
    )


def test_nothing_of_the_size_of_keys_or_values_is_kept() -> None:
    module, offsets = head(64, 48, 32), packed([300, 500])
    hidden_TP = random(800, 64).bfloat16()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(random(2, 48), hidden_TP, offsets, 0.6)
    large = [tensor for tensor in kept if tensor.numel() >= 800 * 32]
    assert large
    assert {tensor.data_ptr() for tensor in large} == {hidden_TP.data_ptr()}


def test_states_must_be_detached() -> None:
    with pytest.raises(ValueError, match="hidden_TP must be detached"):
        head().attend(random(1, P), random(2, P).requires_grad_(), packed([2]))


@pytest.mark.parametrize("size", [1.0, 1e30, 3e38])
@pytest.mark.parametrize("bias", [False, True])
def test_at_omega_one_the_score_is_the_reward_models_own(size: float, bias: bool) -> None:
    module = head(bias=bias, std=50.0)
    original = nn.Linear(D, 1, bias=bias)
    with torch.no_grad():
        original.weight.copy_(random(1, D, seed=1))
        if bias:
            original.bias.copy_(random(1, seed=2))
    rte_ND = random(3, D)
    reward_N = module(rte_ND, random(6, P, seed=4).clamp(-1, 1) * size, packed([2, 3, 1]), 1.0)
    assert torch.equal(reward_N, original(rte_ND)[:, 0])
    torch.autograd.backward(reward_N.sum())
    assert {name for name, grad in gradients(module).items() if grad is None} == CROSS_ATTENTION


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_omega_outside_its_range_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"omega must be in \[0, 1\]"):
        head().output(random(1, D), random(1, P), weight)


@pytest.mark.parametrize("weight", [0.6, 1.0])
def test_without_feedback_the_head_is_the_scoring_layer(weight: float) -> None:
    module, rte_ND, offsets = head(0), random(4, D), packed([2, 3, 1, 5])
    reward_N = module(rte_ND, torch.zeros(11, 0), offsets, weight)
    assert module.score_bias is not None
    by_hand = [
        weight * sum((row * module.score_weight).tolist()) + module.score_bias.item() for row in rte_ND
    ]
    assert reward_N.tolist() == pytest.approx(by_hand, rel=1e-5)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.autograd.backward((reward_N * random(4, seed=1)).sum())
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"score_weight", "score_bias"}
    diagnostics = module.diagnostics(rte_ND, torch.zeros(11, 0), offsets)
    assert diagnostics.norm_ratio_N.tolist() == [0, 0, 0, 0]
    assert diagnostics.entropy_N.tolist() == pytest.approx([math.log(n) for n in (2, 3, 1, 5)])


def test_diagnostics_equal_the_literal_form() -> None:
    module, offsets = head().double(), packed([4, 1, 3])
    rte_ND, hidden_TP = random(3, D).double(), random(8, P, seed=1).double()
    result = module.diagnostics(rte_ND, hidden_TP, offsets)
    rows = torch.split(result.weight_T, [4, 1, 3])
    assert [row.sum().item() for row in rows] == pytest.approx([1, 1, 1])
    expected = [-(row * row.log()).sum().item() for row in rows]
    assert result.entropy_N.tolist() == pytest.approx(expected)
    feedback_ND = literal_equation_3(module, rte_ND, hidden_TP, offsets)
    torch.testing.assert_close(result.norm_ratio_N, (feedback_ND.norm(dim=1) / rte_ND.norm(dim=1)).detach())
    assert not result.norm_ratio_N.requires_grad
