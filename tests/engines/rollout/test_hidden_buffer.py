"""The side buffer beside the KV cache: what is written to a slot is read from it, in chunks of any size."""

from __future__ import annotations

import pytest
import torch

from r2m_ray.engines.rollout.vllm_engine import Export, _joined, prepare_environment


@pytest.mark.parametrize("read_tokens", [1, 7, 1000])
def test_rows_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch, read_tokens: int) -> None:
    prepare_environment({})
    from r2m_ray.engines.rollout import vllm_worker

    monkeypatch.setattr(vllm_worker, "READ_TOKENS", read_tokens)
    buffer = vllm_worker.HiddenBuffer(blocks=6, block_size=4)
    # Request a has 6 tokens in blocks 5 and 2, request b has 3 in block 1; one slot is padding.
    slot_T = torch.tensor([20, 21, 22, 23, 8, 9, -1, 4, 5, 6])
    hidden_TP = torch.arange(30.0).view(10, 3)
    token_T, position_T = torch.arange(100, 110), torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 1, 2])
    buffer.write(slot_T, hidden_TP, token_T, position_T)
    found = buffer.read([vllm_worker.Finished("b", 3, (1,)), vllm_worker.Finished("a", 6, (5, 2))])
    for name, rows in (("a", slice(0, 6)), ("b", slice(7, 10))):
        assert torch.equal(found[name].hidden_TP, hidden_TP[rows])
        assert torch.equal(found[name].token_T, token_T[rows])
        assert torch.equal(found[name].position_T, position_T[rows])
    buffer.forget()
    (again,) = buffer.read([vllm_worker.Finished("b", 3, (1,))]).values()
    assert again.token_T.tolist() == [-1, -1, -1]


def test_columns_of_ranks_are_joined_where_the_ranks_agree() -> None:
    token_T, position_T = torch.tensor([7, 8, 9]), torch.arange(3)
    left = Export(torch.ones(3, 2), token_T, position_T)
    right = Export(torch.zeros(3, 1), torch.tensor([7, 5, 9]), position_T)
    (joined,) = _joined([{"a": left}, {"a": right, "b": right}]).values()
    assert joined.hidden_TP.tolist() == [[1, 1, 0]] * 3
    # The ranks computed the second row from different tokens, so it proves nothing.
    assert joined.token_T.tolist() == [7, -1, 9]
    assert joined.position_T.tolist() == [0, -1, 2]
