"""What the engine samples: seeds, log-probs, end tokens, proofs of the hidden states, refusals."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_rows import STOP_TOKENS, readings, sample_plan
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from r2m_ray.core.batch import Prompt, Trajectories
from r2m_ray.engines.rollout.engine import RolloutEngine, row_seed
from r2m_ray.engines.rollout.vllm_engine import Export, prepare_environment, refuse_unknown_version
from r2m_ray.errors import InputError, RunError


@pytest.fixture(scope="module")
def engine(start_engine: Callable[..., Any], policy_dir: Path) -> Iterator[RolloutEngine]:
    with start_engine(policy_dir) as engine:
        yield engine


def assert_same(one: Trajectories, other: Trajectories) -> None:
    """Bit-identical tokens and log-probs."""
    assert torch.equal(one.layout.offsets, other.layout.offsets)
    assert torch.equal(one.label_T, other.label_T)
    assert torch.equal(one.rollout_logp_T, other.rollout_logp_T)


def test_logprobs_are_those_of_the_tempered_logits(engine: RolloutEngine, policy: PreTrainedModel) -> None:
    ((rows, _),) = engine.sample([sample_plan(greedy_first=True)])
    for n, (where, _, logits) in enumerate(readings(policy, rows)):
        greedy = n % 4 == 0
        logp = (logits if greedy else logits / 0.7).log_softmax(-1)
        logp = logp.gather(1, rows.label_T[where, None])[:, 0]
        action = rows.action_T[where]
        torch.testing.assert_close(rows.rollout_logp_T[where][action], logp[action], atol=1e-4, rtol=0)
        assert torch.all(rows.rollout_logp_T[where][~action] == 0)
        if greedy:
            assert torch.equal(logits.argmax(-1)[action], rows.label_T[where][action])


def test_temperature_zero_is_greedy_in_every_row(engine: RolloutEngine) -> None:
    ((greedy, _),) = engine.sample([sample_plan(temperature=0.0, group_size=2)])
    ((mixed, _),) = engine.sample([sample_plan(greedy_first=True)])
    for group in range(6):
        first = greedy.label_T[greedy.layout.slice_of(2 * group)]
        assert torch.equal(first, greedy.label_T[greedy.layout.slice_of(2 * group + 1)])
        assert torch.equal(first, mixed.label_T[mixed.layout.slice_of(4 * group)])


def test_a_plan_gives_the_same_rows_in_any_batch(engine: RolloutEngine) -> None:
    plan = sample_plan()
    ((alone, alone_hidden),) = engine.sample([plan])
    shards = engine.sample(
        [sample_plan(seed=9, temperature=1.3), plan, sample_plan(step=2, greedy_first=True)]
    )
    assert_same(alone, shards[1][0])
    # Hidden states pass through kernels that block by batch size: equal values, not equal bits.
    torch.testing.assert_close(alone_hidden.hidden_TP, shards[1][1].hidden_TP, atol=1e-5, rtol=1e-5)


def test_seed_step_and_row_each_change_the_sample(engine: RolloutEngine) -> None:
    plans = [sample_plan(), sample_plan(seed=4), sample_plan(step=2)]
    labels = [tuple(rows.label_T.tolist()) for rows, _ in engine.sample(plans)]
    assert len(set(labels)) == 3
    ((rows, _),) = engine.sample([sample_plan(temperature=1.5)])
    assert len({rows.responses[n] for n in range(4)}) == 4


@pytest.mark.skipif(torch.accelerator.is_available(), reason="on an accelerator what vLLM compiles pays")
@pytest.mark.usefixtures("engine")
def test_beside_an_eager_engine_on_a_cpu_nothing_is_compiled() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    plus_one = torch.compile(lambda x: x + 1, backend=backend)
    assert plus_one(torch.ones(2)).tolist() == [2.0, 2.0]
    assert compiled == []


def test_row_seeds_are_pinned_and_distinct() -> None:
    assert row_seed(0, 1, 2, 3) == 8479124504904169328
    seeds = {row_seed(s, t, p, j) for s in range(3) for t in range(3) for p in range(10) for j in range(8)}
    assert len(seeds) == 720
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_responses_end_with_any_end_token_or_are_truncated(
    engine: RolloutEngine, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ((rows, _),) = engine.sample([sample_plan(group_size=32, temperature=1.5, max_new_tokens=60)])
    last = set()
    for n in range(rows.layout.rows):
        where = rows.layout.slice_of(n)
        response = rows.label_T[where][rows.action_T[where]].tolist()
        ended = response[-1] in STOP_TOKENS
        assert not set(response[:-1]) & set(STOP_TOKENS)
        assert rows.truncated_N[n] == (not ended)
        assert ended or len(response) == 60
        words = [f"w{i - 4}" for i in response if i >= 4]
        assert rows.responses[n].split() == words
        last.add(response[-1] if ended else None)
    assert last == {*STOP_TOKENS, None}
    assert tiny_tokenizer.eos_token_id == STOP_TOKENS[0]


def test_an_end_token_alone_is_a_response(engine: RolloutEngine) -> None:
    ((rows, hidden),) = engine.sample([sample_plan(group_size=128, temperature=2.0, max_new_tokens=2)])
    empty = [n for n in range(rows.layout.rows) if rows.response_lengths[n] == 1]
    assert empty
    for n in empty:
        where = rows.layout.slice_of(n)
        assert int(rows.label_T[where][-1]) in STOP_TOKENS
        assert not rows.truncated_N[n]
    assert len(hidden.hidden_TP) == rows.layout.tokens


def test_records_carry_prompts_layout_and_version(engine: RolloutEngine) -> None:
    plan = sample_plan(group_size=2)
    ((rows, hidden),) = engine.sample([plan])
    assert rows.prompts == tuple(prompt.text for prompt in plan.prompts)
    assert rows.version == engine.version == 0
    assert rows.layout.group_size == 2
    assert torch.equal(hidden.layout.offsets, rows.layout.offsets)
    prompt_tokens = torch.tensor([3 + 12 * (n // 2) for n in range(12)])
    assert torch.equal(rows.layout.lengths, prompt_tokens + rows.response_lengths - 1)
    # Inference tensors could not be saved for a backward pass.
    assert not hidden.hidden_TP.is_inference()


def test_torn_rows_are_sampled_again(engine: RolloutEngine) -> None:
    ((before, before_hidden),) = engine.sample([sample_plan()])
    count = engine.stats()["regenerated_rows"]
    # Now the prefix cache holds the long prompts, but their hidden states are invalid.
    engine._vllm._llm.collective_rpc("forget_hidden")
    ((after, after_hidden),) = engine.sample([sample_plan()])
    # Prompts of 39, 51 and 63 tokens fill a block of 32.
    assert engine.stats()["regenerated_rows"] - count == 3 * 4
    assert_same(before, after)
    torch.testing.assert_close(before_hidden.hidden_TP, after_hidden.hidden_TP, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda e: {}, "missing"),
        (
            lambda e: {
                name: Export(x.hidden_TP[1:], x.token_T[1:], x.position_T[1:]) for name, x in e.items()
            },
            "rows for",
        ),
        (lambda e: dict(zip(e, reversed(e.values()), strict=True)), "rows for|other tokens"),
        (
            lambda e: {name: Export(x.hidden_TP, x.token_T + 1, x.position_T) for name, x in e.items()},
            "other tokens, twice",
        ),
        (
            lambda e: {name: Export(x.hidden_TP, x.token_T, x.position_T + 1) for name, x in e.items()},
            "positions",
        ),
    ],
)
def test_hidden_states_torn_twice_are_an_error(
    engine: RolloutEngine,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[dict[str, Export]], dict[str, Export]],
    message: str,
) -> None:
    from r2m_ray.engines.rollout.vllm_worker import HiddenStatesConnector

    take = HiddenStatesConnector.take_exports
    monkeypatch.setattr(HiddenStatesConnector, "take_exports", lambda self: fault(take(self)))
    with pytest.raises(RunError, match=message):
        engine.sample([sample_plan(group_size=1)])


def test_the_export_shares_the_memory_of_keys_and_values(
    engine: RolloutEngine, policy: PreTrainedModel
) -> None:
    config, cache = policy.config, engine._vllm._llm.llm_engine.vllm_config.cache_config
    keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    exported = config.hidden_size * 4 + 16
    used = cache.num_gpu_blocks * cache.block_size * (keys_and_values + exported)
    assert 0.99 < used / cache.kv_cache_memory_bytes <= 1


def test_prompts_that_are_empty_or_too_long_are_refused(engine: RolloutEngine) -> None:
    with pytest.raises(InputError, match="prompt 7 has 0 tokens"):
        engine.sample([sample_plan(prompts=(Prompt(index=7, text=""),))])
    long = Prompt(index=8, text=" ".join(["w1"] * 109))
    with pytest.raises(InputError, match="prompt 8 has 109 tokens, where 1 to 108"):
        engine.sample([sample_plan(prompts=(long,))])


def test_a_second_exporting_engine_in_this_process_is_refused(
    engine: RolloutEngine, start_engine: Callable[..., Any], policy_dir: Path
) -> None:
    with pytest.raises(InputError, match="already runs"), start_engine(policy_dir):
        pass


@pytest.mark.parametrize(
    ("engine_args", "message"),
    [
        ({"max_num_seq": 4}, r"engine_args\.max_num_seq: .*max_num_seqs"),
        ({"trust_remote_code": True}, "sets this itself"),
        ({"pipeline_parallel_size": 2}, r"pipeline_parallel_size=2: .*with 1 only"),
    ],
)
def test_engine_arguments_that_cannot_work_are_refused(
    start_engine: Callable[..., Any],
    policy_dir: Path,
    engine_args: dict[str, Any],
    message: str,
) -> None:
    with (
        pytest.raises(InputError, match=message),
        start_engine(policy_dir, engine_args=engine_args),
    ):
        pass


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0", "0.33.0rc1"])
def test_other_versions_of_vllm_are_refused(
    version: str, monkeypatch: pytest.MonkeyPatch, start_engine: Callable[..., Any], policy_dir: Path
) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(InputError, match=f"vLLM {version} is installed"), start_engine(policy_dir):
        pass


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.7"])
def test_supported_versions_of_vllm_are_accepted(version: str) -> None:
    refuse_unknown_version(version)


def test_the_environment_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    prepare_environment({})
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "WARNING"
    assert os.environ["VLLM_NO_USAGE_STATS"] == os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
