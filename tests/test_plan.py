"""`r2m-ray plan`: batch arithmetic and memory against hand-calculated numbers and real objects."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from r2m_ray.__main__ import main
from r2m_ray.batch import pack_rows
from r2m_ray.compose import load_config
from r2m_ray.config import Config, Dtype, OldLogprobs
from r2m_ray.core.head import R2MHead
from r2m_ray.core.packing import microbatches
from r2m_ray.models.blocks import grids
from r2m_ray.models.weights import pack_buckets
from r2m_ray.plan import Plan, checkpoint_bytes, plan, record_bytes
from r2m_ray.plan_batch import batch_plan
from r2m_ray.plan_memory import PROCESS_BYTES, ActorMemory, actor_memory
from r2m_ray.plan_models import ModelSizes, model_sizes, sizes_of
from r2m_ray.plan_parts import activations, bucket_bytes, cached_tokens, head_parameters

POLICY = ModelSizes(
    name="policy", parameters=1_000_000, largest=200_000, width=64, layers=2, feed_forward=128,
    key_value=64, vocabulary=160,
)  # fmt: skip
REWARD = replace(POLICY, name="reward", parameters=500_000, largest=100_000, width=48)
MODELS = {"policy": POLICY, "reference": POLICY, "reward": REWARD}


def demo(*overrides: str) -> Config:
    return load_config(["experiment=demo", *overrides])


def actor(config: Config, role: str) -> ActorMemory:
    found = {a.role: a for a in actor_memory(config, batch_plan(config), MODELS)}
    return found[role]


# Batches


def test_batch_arithmetic_by_hand() -> None:
    batch = batch_plan(demo("policy.ranks=2", "rollout.replicas=3", "cluster.cpus=4", "evaluate.every=5"))
    assert (batch.prompts, batch.rows, batch.shards, batch.rows_per_shard) == (16, 128, 4, 32)
    assert batch.shards_per_replica == {
        "rollout": (1, 2),
        "policy": (2, 2),
        "reference": (4, 4),
        "reward": (4, 4),
    }
    # Two mini-batches of 8 prompts, two epochs, 24 steps.
    assert (batch.minibatches, batch.optimizer_steps, batch.run_optimizer_steps) == (2, 4, 96)
    # 64 + 48 tokens, of which the last is never read; 18 such rows fit into 2048 tokens.
    assert (batch.row_tokens, batch.tokens_least, batch.tokens_most) == (111, 128, 128 * 111)
    assert (batch.rows_per_rank, batch.passes_per_minibatch) == (32, 2)
    # Four training passes, and the second mini-batch is scored for π_old.
    assert batch.policy_passes == (4 + 1) * 2
    assert (batch.head_updates, batch.run_head_updates, batch.run_rows) == (1, 24, 3072)
    # Before step 1, after 5, 10, 15, 20 and 24; checkpoints after 10, 20 and 24.
    assert (batch.evaluations, batch.checkpoints) == (6, 3)


def test_without_a_scoring_pass_every_pass_trains() -> None:
    config = demo()
    config.algo.old_logp = OldLogprobs.rollout
    batch = batch_plan(config)
    assert batch.policy_passes == batch.optimizer_steps * batch.passes_per_minibatch == 4 * 4


@pytest.mark.parametrize("every", [0, 1, 5, 6, 24, 30])
def test_evaluations_and_checkpoints_are_those_of_the_loop(every: int) -> None:
    batch = batch_plan(demo(f"evaluate.every={every}", f"checkpoint.every={every}"))
    taken = [t for t in range(1, 25) if t == 24 or (every and t % every == 0)]
    assert batch.checkpoints == len(taken)
    assert batch.evaluations == len(taken) + 1


@given(st.lists(st.integers(1, 111), min_size=64, max_size=64), st.integers(1, 1500))
def test_no_layout_needs_more_passes_than_planned(lengths: list[int], budget: int) -> None:
    config = Config()
    config.policy.tokens_per_microbatch = budget
    planned = batch_plan(config)
    assert planned.rows_per_rank == 64
    assert len(grids(lengths, budget)) <= planned.passes_per_minibatch
    assert len(microbatches(lengths, budget)) <= planned.passes_per_minibatch


# Memory


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype", "weights", "gradients", "optimizer"),
    [
        (0, 1, "float32", 4_000_000, 4_000_000, 8_000_000),
        (0, 2, "float32", 4_000_000, 4_000_000, 8_000_000),
        (1, 2, "float32", 4_000_000, 4_000_000, 6_000_000),
        (2, 1, "float32", 4_000_000, 4_000_000, 12_000_000),
        (2, 2, "float32", 4_000_000, 2_000_000, 6_000_000),
        (2, 2, "bfloat16", 2_000_000, 2_000_000, 6_000_000),
        # ZeRO-3 keeps a share and gathers all of so small a model.
        (3, 1, "float32", 8_000_000, 4_000_000, 12_000_000),
        (3, 2, "float32", 6_000_000, 2_000_000, 6_000_000),
    ],
)
def test_a_learner_rank_by_zero_stage(
    stage: int, ranks: int, dtype: str, weights: int, gradients: int, optimizer: int
) -> None:
    zero = f"+policy.deepspeed.zero_optimization.stage={stage}"
    learner = actor(demo(zero, f"policy.ranks={ranks}", f"model.dtype={dtype}"), "policy")
    assert (learner.count, learner.weights) == (ranks, weights)
    assert (learner.gradients, learner.optimizer) == (gradients, optimizer)
    assert learner.host == PROCESS_BYTES["policy"] + weights + gradients + optimizer + learner.working
    assert learner.device == learner.buffers == 0


def test_working_memory_of_the_learner_by_hand() -> None:
    learner = actor(demo("policy.ranks=2"), "policy")
    layer = 9 * 64 + 64 + 4 * 128
    states = 2048 * 4 * (2 * layer + layer)
    logits = 4 * 4 * 2048 * 160
    bucket = 1_000_000 * 4
    fresh = 2 * (128 * 111 // 2) * 64 * 4
    assert learner.working == states + logits + bucket + fresh == 41_191_680


def test_gradient_checkpointing_keeps_one_layer_and_the_inputs_of_all() -> None:
    layer = 9 * 64 + 64 + 4 * 128
    assert activations(POLICY, 10, 2, True) == 10 * 2 * (2 * 64 + 2 * layer) + 16 * 10 * 160


def test_a_checkpoint_in_the_making_is_the_largest_phase_of_a_large_model() -> None:
    config = demo("policy.tokens_per_microbatch=128", "policy.ranks=2")
    # Weight and moments of 100 M parameters, gathered whole by rank 0.
    models = {**MODELS, "policy": replace(POLICY, parameters=100_000_000)}
    learner = next(a for a in actor_memory(config, batch_plan(config), models) if a.role == "policy")
    assert learner.working == 1_200_000_000


def test_a_rollout_engine_holds_cache_and_exported_states() -> None:
    engine = actor(demo(), "rollout")
    # 2048 blocks of 32: keys and values of two layers, and a state with its token and position.
    assert engine.cache == 2048 * 32 * (2 * 64 * 4 + 64 * 4 + 16) == 51_380_224
    vanilla = actor(demo("reward=vanilla"), "rollout")
    assert vanilla.cache == 2048 * 32 * 2 * 64 * 4
    learner_feedback = actor(demo("feedback.source=learner"), "rollout")
    assert learner_feedback.cache == vanilla.cache


def test_the_cache_on_a_cpu_is_what_the_environment_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    config = demo()
    config.rollout.engine_args = {}
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert cached_tokens(config, POLICY) == 2**31 // (2 * 64 * 4)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert cached_tokens(config, POLICY) == 2**30 // (2 * 64 * 4)
    config.rollout.engine_args = {"kv_cache_memory_bytes": 2**20, "block_size": 16}
    assert cached_tokens(config, POLICY) == 2**20 // (2 * 64 * 4)


def test_on_gpus_process_and_buffers_stay_in_the_machines_memory() -> None:
    config = demo("cluster.gpus_per_learner=1", "cluster.gpus_per_rollout=1", "reward=vanilla")
    config.rollout.engine_args = {}
    learner, engine = actor(config, "policy"), actor(config, "rollout")
    assert engine.cache is None
    assert cached_tokens(config, POLICY) is None
    assert learner.host == learner.process + learner.buffers
    # What is written is copied from the GPU first: the state, then the model in its own type.
    assert learner.buffers == 12_000_000 + 4_000_000
    assert learner.device == learner.weights + learner.gradients + learner.optimizer + learner.working
    # DeepSpeed's reduction bucket is allocated whole there.
    assert learner.working > 2_000_000_000


def test_a_reward_replica_holds_trunk_and_head() -> None:
    replica = actor(demo(), "reward")
    head = 4 * (2 * 64 * (48 + 64) + 48)
    assert replica.weights == 2_000_000 + head
    assert replica.gradients == replica.optimizer == 2 * head


def test_the_heads_size_is_the_heads() -> None:
    head = R2MHead(64, 48, 64, torch.zeros(48))
    assert head_parameters(demo(), MODELS) == sum(p.numel() for p in head.parameters())
    without = R2MHead(0, 48, 64, torch.zeros(48))
    assert head_parameters(demo("reward=vanilla"), MODELS) == sum(p.numel() for p in without.parameters())


# Records, buckets, checkpoints


def test_records_are_as_large_as_real_ones() -> None:
    config = demo("task.max_prompt_tokens=5", "task.max_new_tokens=3", "algo.prompts_per_step=8")
    batch = batch_plan(config)
    trajectories = pack_rows(["p"] * 8, [[7] * 5] * 8, [[8] * 3] * 64, ["r"] * 64, version=1)
    tensors = (
        trajectories.input_T,
        trajectories.label_T,
        trajectories.action_T,
        trajectories.rollout_logp_T,
        trajectories.truncated_N,
        trajectories.layout.offsets[1:],
    )
    assert trajectories.layout.tokens == batch.tokens_most == 64 * 7
    records = record_bytes(config, batch, MODELS)
    text = 4 * batch.tokens_most
    assert records["trajectories"] == sum(tensor.nbytes for tensor in tensors) + text
    assert records["hidden"] == records["fresh_hidden"] == torch.empty(64 * 7, 64).nbytes
    assert records["annotation"] == torch.empty(64, 48).nbytes + 64 * (4 + 4 + 4 + 8)
    assert records["reference"] == 2 * torch.empty(64 * 7).nbytes
    assert records["human_pairs"] == 0


def test_vanilla_sends_no_states_and_no_refresh_sends_them_once() -> None:
    batch = batch_plan(demo())
    assert record_bytes(demo("reward=vanilla"), batch, MODELS)["hidden"] == 0
    unrefreshed = record_bytes(demo("feedback.refresh=none"), batch, MODELS)
    assert unrefreshed["hidden"] > 0
    assert unrefreshed["fresh_hidden"] == 0


def test_human_pairs_are_two_rows_beside_the_responses_of_each_prompt() -> None:
    config = demo("reward=r2m_anchor")
    batch = batch_plan(config)
    records = record_bytes(config, batch, MODELS)
    own = records["trajectories"] + records["hidden"] + records["annotation"]
    assert batch.responses_per_prompt * records["human_pairs"] == 2 * own


@pytest.mark.parametrize("megabytes", [1, 3, 256])
def test_no_bucket_is_larger_than_planned(megabytes: int) -> None:
    # As many numbers in tensors of 200,000 at most.
    tensors = [(f"w{i}", torch.zeros(100_000 * (1 + i % 2))) for i in range(6)]
    tensors.append(("last", torch.zeros(100_000)))
    config = demo(f"sync.bucket_mb={megabytes}")
    largest = max(bucket.data.numel() for bucket in pack_buckets(tensors, megabytes * 2**20))
    assert 0.6 * bucket_bytes(config, POLICY) <= largest <= bucket_bytes(config, POLICY)


def test_checkpoints_by_hand() -> None:
    head = 2 * 64 * (48 + 64) + 48
    assert checkpoint_bytes(demo(), MODELS) == 1_000_000 * (4 + 12) + 12 * head
    assert checkpoint_bytes(demo("model.dtype=bfloat16"), MODELS) == 1_000_000 * (2 + 12) + 12 * head


# Models


def test_sizes_are_counted_without_weights(tiny_policy_dir: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_policy_dir)
    config.save_pretrained(tmp_path)
    sizes = sizes_of("x", AutoConfig.from_pretrained(tmp_path), classifier=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    assert sizes.parameters == model.num_parameters()
    assert sizes.largest == max(p.numel() for p in model.parameters()) == 160 * 64
    assert (sizes.width, sizes.layers, sizes.feed_forward, sizes.vocabulary) == (64, 2, 128, 160)
    # One key-value head of width 32.
    assert sizes.key_value == 2 * 32
    assert Dtype.float32.value == str(model.dtype).removeprefix("torch.")


def test_prepared_models_are_planned_as_they_would_be_made() -> None:
    from transformers import LlamaForCausalLM

    from r2m_ray.stages import build
    from r2m_ray.tasks import note2answer

    config = demo()
    made = build._architecture(note2answer.tokenizer(), layers=3, width=96, heads=3, positions=112)
    sizes, _ = model_sizes(config)
    assert sizes["policy"].parameters == LlamaForCausalLM(made).num_parameters()
    assert sizes["policy"].feed_forward == made.intermediate_size


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """The configuration file of an 8 B Llama, and nothing else."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def dialogue(large: Path, *overrides: str) -> Plan:
    models = (f"model.policy={large}", f"model.reward={large}", f"run.root={large.parent}")
    return plan(load_config(["experiment=dialogue_llama3_8b", *models, *overrides]))


def test_eight_billion_parameters_on_four_ranks(large: Path) -> None:
    found = dialogue(large)
    learner = next(a for a in found.actors if a.role == "policy")
    parameters = 8_030_261_248
    assert found.models["policy"].parameters == parameters
    assert learner.optimizer == 12 * parameters // 4
    assert found.sync == 2 * parameters
    assert found.checkpoint == pytest.approx(14 * parameters, rel=1e-2)
    assert found.records["hidden"] == 512 * (1024 + 512 - 1) * 4096 * 2


def doubts(found: Plan) -> dict[str, str]:
    return {p.path: p.message for p in found.warnings if p.warning}


def test_doubts_are_told_where_they_are_due(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A token file of this machine is a doubt of its own.
    monkeypatch.setenv("HOME", str(tmp_path))
    fine = dialogue(large, "cluster=gpu_cluster", "rollout.engine_args.gpu_memory_utilization=0.85")
    assert doubts(fine).keys() <= {"run.root"}
    tight = doubts(
        dialogue(
            large,
            "cluster.object_store_gb=4",
            "policy.tokens_per_microbatch=1000",
            "rollout.engine_args.gpu_memory_utilization=0.97",
        )
    )
    assert "spilled to disk" in tight["cluster.object_store_gb"]
    assert "1535 tokens" in tight["policy.tokens_per_microbatch"]
    # 8208 bytes of states beside 131072 of keys and values.
    assert "6% of the KV cache" in tight["rollout.engine_args.gpu_memory_utilization"]
    vast = doubts(dialogue(large, "cluster.gpus_per_learner=0", "policy.ranks=8", "algo.prompts_per_shard=4"))
    assert "this machine has" in vast["cluster.address"]


# The command


def test_a_plan_starts_nothing_and_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from r2m_ray.__main__ import main; code = main(['plan', 'experiment=demo']);"
        "print(code, sorted({'ray', 'vllm', 'deepspeed', 'trl'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stderr.splitlines()[-1] == "0 []"
    assert "optimizer steps of the policy" in done.stdout
    assert "train will not start: model.policy" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_is_the_plan(
    tiny_policy_dir: Path, tiny_reward_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [f"model.policy={tiny_policy_dir}", f"model.reward={tiny_reward_dir}"]
    assert main(["plan", "experiment=demo", *models, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(json.dumps(plan(demo(*models)).document()))
    assert document["batch"]["rows"] == 128
    hosts = {a["role"]: a["host"] for a in document["actors"]}
    assert hosts.keys() == {"rollout", "policy", "reference", "reward"}
    assert document["host"] == sum(hosts.values()) + document["driver"] + document["ray"]


def test_a_model_of_unknown_size_leaves_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=demo", "model.policy=org/none", "model.reference=org/none"]) == 0
    text = capsys.readouterr().out
    assert "org/none is not in the local cache, so its size is unknown" in text
    assert "optimizer steps of the policy" in text
    found = plan(demo("model.policy=org/none", "reward=vanilla"))
    assert [a.role for a in found.actors] == ["reward"]
    assert found.records == {}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algo.stepz=3", "Did you mean algo.steps?"),
        ("algo.prompts_per_step=6", "is not a multiple of algo.prompts_per_shard=4"),
        ("model.policy=/no/model", "model.policy: /no/model: no such directory"),
        ("+policy.deepspeed.train_batch_size=8", "policy.deepspeed.train_batch_size"),
    ],
)
def test_mistakes_are_those_of_train(override: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=demo", override]) == 2
    assert words in capsys.readouterr().err
