"""`r2m-ray plan` of complete models: their sizes, placement, what is doubtful, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from r2m_ray.__main__ import main
from r2m_ray.cli.checks.plan import Plan, model_sizes, placement, plan, sizes_of
from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import Config, Dtype


def demo(*overrides: str) -> Config:
    return load_config(["experiment=demo", *overrides])


def test_sizes_are_counted_without_weights(tiny_policy_dir: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_policy_dir)
    config.save_pretrained(tmp_path)
    sizes = sizes_of(AutoConfig.from_pretrained(tmp_path), classifier=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    assert sizes.parameters == model.num_parameters()
    assert sizes.largest == max(p.numel() for p in model.parameters()) == 160 * 64
    assert (sizes.width, sizes.layers, sizes.feed_forward, sizes.vocabulary) == (64, 2, 128, 160)
    # One key-value head of width 32.
    assert sizes.key_value == 2 * 32
    assert Dtype.float32.value == str(model.dtype).removeprefix("torch.")


def test_prepared_models_are_planned_as_they_would_be_made() -> None:
    from transformers import LlamaForCausalLM

    from r2m_ray.tasks.note2answer import world as note2answer
    from r2m_ray.tasks.prepare import build

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


def test_doubts_are_reported_where_they_are_due(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A token file of this machine is a doubt of its own.
    monkeypatch.setenv("HOME", str(tmp_path))
    fine = dialogue(large, "cluster=gpu_cluster")
    assert doubts(fine).keys() <= {"run.root"}
    tight = doubts(dialogue(large, "cluster.object_store_gb=4", "policy.tokens_per_microbatch=1000"))
    assert "spilled to disk" in tight["cluster.object_store_gb"]
    assert "1535 tokens" in tight["policy.tokens_per_microbatch"]
    (small,) = [p for p in dialogue(large, "cluster.gpus_per_learner=1").warnings if "too small" in str(p)]
    assert "GPU: 8 needed" in small.message
    cramped = "\n".join(map(str, dialogue(large, "cluster.placement=STRICT_SPREAD").warnings))
    assert "STRICT_SPREAD puts 8 actors on as many nodes, 1 in the cluster" in cramped
    cpus = [f"cluster.gpus_per_{role}=0" for role in ("learner", "rollout", "reference", "reward")]
    cpus += ["sync.backend=object_store", "policy.ranks=8", "algo.prompts_per_shard=4"]
    vast = doubts(dialogue(large, *cpus))
    assert "the run takes up to" in vast["cluster.address"]


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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A hub of one model, ``org/model``; yields the paths that it was asked for."""
    asked: list[str] = []
    LlamaConfig(hidden_size=64, num_attention_heads=2).save_pretrained(tmp_path / "hub")

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            known = self.path == "/org/model/resolve/main/config.json"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((tmp_path / "hub" / "config.json").read_bytes() if known else b"")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield asked
        server.shutdown()


def test_a_model_of_the_hub_is_known_by_its_configuration_file(hub: list[str]) -> None:
    sizes, problems = model_sizes(demo("model.policy=org/model"))
    assert problems == []
    assert sizes["policy"] == sizes["reference"]
    assert (sizes["policy"].width, sizes["policy"].layers) == (64, 32)
    assert hub == ["/org/model/resolve/main/config.json"]


def test_a_model_that_cannot_be_looked_up_leaves_the_batches(
    hub: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", "experiment=demo", "model.policy=org/none"]) == 0
    text = capsys.readouterr().out
    assert "org/none is not in the local cache, and its config.json cannot be read from the hub (" in text
    assert "optimizer steps of the policy" in text
    assert hub == ["/org/none/resolve/main/config.json"]
    found = plan(demo("model.policy=org/none"))
    assert (list(found.actors), found.records, found.store) == ([], {}, 0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (offline,) = model_sizes(demo("model.policy=org/none"))[1]
    assert "offline mode is enabled" in offline.message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}")
    (refused,) = model_sizes(demo("model.policy=org/none"))[1]
    assert "Connection refused" in refused.message


def test_placement_says_which_roles_share_nodes() -> None:
    two_nodes = ["cluster=gpu_cluster", "algo.prompts_per_step=32", "algo.minibatch_prompts=32"]
    (packed,) = placement(demo(*two_nodes))
    assert packed.startswith("16 actors (CPUs 32, GPUs 16); on nodes of 8 GPUs, filled in order, 2 nodes: ")
    assert packed.endswith(": policy × 8; rollout × 6, reward × 1, reference × 1")
    (strict,) = placement(demo(*two_nodes, "cluster.placement=STRICT_PACK"))
    assert "all roles share one node" in strict
    (spread,) = placement(demo(*two_nodes, "cluster.placement=STRICT_SPREAD"))
    assert "each of the 16 actors" in spread
    (local,) = placement(demo())
    assert local.startswith(
        "all roles share this machine, 4 actors (CPUs 1, GPUs 0): policy × 1, rollout × 1"
    )


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
