"""What the lab adds to a preparation: a trunk that learns to count, a copied policy, and its own settings."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from benchmarks.overoptimization import worlds
from benchmarks.overoptimization.presets import INFORMATIVE
from benchmarks.overoptimization.pretraining import learn_counts, standardised
from benchmarks.overoptimization.worlds import find, prepare, recipe, run_overrides
from r2m_ray.engines.text import conversation_ids
from r2m_ray.errors import InputError
from r2m_ray.tasks.prepare.store import Prepared
from r2m_ray.tasks.prepare.trainers import Training

CONVERSATIONS = [("w1 w2", "w3 w4 w5"), ("w7", "w8 w3"), ("w2 w9", "w10 w3 w3 w11")]
COUNTS = [[3.0, 1.0, 7.0], [2.0, 1.0, 7.0], [4.0, 2.0, 7.0]]


def plan(steps: int, batch: int, learning_rate: float = 1e-3) -> Training:
    return Training(steps=steps, batch=batch, learning_rate=learning_rate, seed=0)


@pytest.fixture
def reward(tiny_reward_dir: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(tiny_reward_dir)


def test_counts_are_standardised_and_a_constant_one_is_zero() -> None:
    target = standardised(torch.tensor(COUNTS))
    third = math.sqrt(1.5)
    expected = [[0.0, -third / math.sqrt(3), 0.0], [-third, -third / math.sqrt(3), 0.0]]
    torch.testing.assert_close(target[:2], torch.tensor(expected))
    torch.testing.assert_close(target.square().mean(0), torch.tensor([1.0, 1.0, 0.0]))


def test_the_loss_is_the_mean_square_error_at_the_last_token(
    reward: PreTrainedModel, tiny_reward_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)
    torch.manual_seed(5)
    # The layer that counts is drawn as a complete model of the same shape is.
    config = type(reward.config).from_pretrained(tiny_reward_dir, num_labels=3)
    weight = type(reward)(config).score.weight
    states = [
        reward.base_model(torch.tensor([conversation_ids(tokenizer, *row)])).last_hidden_state[0, -1]
        for row in CONVERSATIONS
    ]
    expected = (torch.stack(states) @ weight.T - standardised(torch.tensor(COUNTS))).square().mean()
    torch.manual_seed(5)
    trained = learn_counts(reward, tokenizer, CONVERSATIONS, COUNTS, plan(steps=1, batch=3))
    assert trained.losses == ((1, pytest.approx(expected.item(), rel=1e-5)),)


def test_the_trunk_learns_and_the_score_layer_stays(reward: PreTrainedModel, tiny_reward_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)
    random = Random(0)
    texts = [
        ("w1", " ".join(f"w{random.randint(2, 9)}" for _ in range(random.randint(1, 8)))) for _ in range(96)
    ]
    counts = [[float(len(text.split()))] for _, text in texts]
    before = {name: tensor.clone() for name, tensor in reward.state_dict().items()}
    trained = learn_counts(reward, tokenizer, texts, counts, plan(steps=120, batch=16, learning_rate=2e-3))
    assert trained.losses[-1][1] < 0.2 < 1.0 < trained.losses[0][1]
    after = reward.state_dict()
    assert torch.equal(after["score.weight"], before["score.weight"])
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert reward.config.num_labels == 1


def test_zero_steps_change_nothing_and_draw_nothing(reward: PreTrainedModel, tiny_reward_dir: Path) -> None:
    before = {name: tensor.clone() for name, tensor in reward.state_dict().items()}
    state = torch.random.get_rng_state()
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)
    assert learn_counts(reward, tokenizer, CONVERSATIONS, COUNTS, plan(steps=0, batch=2)).losses == ()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in reward.state_dict().items())


def world(root: Path, *overrides: str) -> tuple[str, ...]:
    small = ("sft_rows=256", "sft_steps=12", "pair_rows=128", "reward_steps=8", f"root={root}")
    return ("experiment=overoptimization", *(f"prepare.{word}" for word in small), *overrides)


GOOD = (
    "task.reward_reads_prompt=true",
    "lab.reward_from_policy=true",
    "prepare.reward_width=96",
    "prepare.reward_heads=3",
    "prepare.reward_layers=4",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, few_measures: None) -> Prepared:
    return prepare(world(tmp_path_factory.mktemp("prepared"), "lab.reward_auxiliary_steps=6"))


def digests(made: Prepared) -> list[str]:
    return [
        hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
        for directory in (made.policy_dir, made.reward_dir)
    ]


def test_what_the_lab_adds_is_part_of_the_digest_and_of_no_run(prepared: Prepared) -> None:
    words = world(prepared.directory.parent, "lab.reward_auxiliary_steps=6")
    found = find(words)
    assert found is not None
    assert found.directory == prepared.directory
    assert find(world(prepared.directory.parent)) is None
    assert run_overrides(words) == words[:-1]
    assert [entry["step"] for entry in prepared.facts["reward"]["auxiliary"]["losses"]][-1] == 6
    # A misattribution, a fifth of the wrong facts, is never corrected.
    assert prepared.facts["demonstrator"]["correction_rate"] == pytest.approx(0.8 * 0.6, abs=0.1)
    assert 0.0 <= prepared.facts["policy"]["correction_rate"] <= 1.0


def test_the_digest_of_a_world_is_the_one_of_published_runs() -> None:
    # Models that were prepared before the lab had settings of its own are still found.
    assert recipe((*INFORMATIVE.overrides, "run.seed=0")).settings() == {
        "reward_from_policy": False,
        "reward_auxiliary_steps": 600,
        "reward_auxiliary_truth": False,
    }


def test_another_reward_model_meets_the_same_policy(prepared: Prepared, tmp_path: Path) -> None:
    # Of its own it would train for one step instead of twelve.
    words = world(
        tmp_path, f"lab.policy={prepared.policy_dir}", "prepare.sft_steps=1", "prepare.reward_steps=0", *GOOD
    )
    other = prepare(words)
    ours, theirs = digests(prepared), digests(other)
    assert ours[0] == theirs[0]
    assert other.facts["policy"]["seconds"] == 0
    assert other.facts["policy"]["gold"] == prepared.facts["policy"]["gold"]
    reward, policy = (
        AutoModelForSequenceClassification.from_pretrained(other.reward_dir),
        AutoModelForCausalLM.from_pretrained(prepared.policy_dir),
    )
    own, copied = policy.model.state_dict(), reward.model.state_dict()
    assert all(torch.equal(copied[name], tensor) for name, tensor in own.items())
    assert len(reward.model.layers) == 4
    again = find(words)
    assert again is not None
    assert again.directory == other.directory
    with pytest.raises(InputError, match=r"lab\.policy=.*no config\.json"):
        find(world(tmp_path, f"lab.policy={tmp_path}"))


def test_what_is_no_policy_of_this_task_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    def complaint(directory: Path, *overrides: str) -> str:
        with pytest.raises(InputError) as refused:
            prepare(world(tmp_path / "root", f"lab.policy={directory}", *overrides))
        return str(refused.value)

    assert "holds LlamaForSequenceClassification" in complaint(prepared.reward_dir)
    assert "task.max_new_tokens are" in complaint(prepared.policy_dir, "task.max_new_tokens=500")
    wide = ("lab.reward_from_policy=true", "prepare.reward_width=32", "prepare.reward_heads=2")
    assert "hidden_size would be 32, and the policy's is 96" in complaint(prepared.policy_dir, *wide)
    shallow = ("lab.reward_from_policy=true", "prepare.reward_width=96", "prepare.reward_heads=3")
    assert "prepare.reward_layers=2" in complaint(prepared.policy_dir, *shallow)
    other = tmp_path / "other"
    shutil.copytree(prepared.policy_dir, other)
    words = json.loads((other / "tokenizer.json").read_text())
    ids = words["model"]["vocab"]
    ids |= {"fox": ids["."], ".": ids["fox"]}
    (other / "tokenizer.json").write_text(json.dumps(words))
    assert "its tokenizer is not this task's" in complaint(other)
    (other / "model.safetensors").write_bytes(b"x" * 100)
    assert "copy the file again" in complaint(other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["lab.reward_auxiliary_step=5"],
            r"lab\.reward_auxiliary_step: .*mean reward_auxiliary_steps",
        ),
        (["lab.reward_auxiliary_steps=-1"], r"lab\.reward_auxiliary_steps: -1: .*greater than or equal to 0"),
        (["lab.reward_from_policy=true"], r"prepare\.reward_width: 64, .*use 96"),
        (["lab.reward_from_policy=true"], r"prepare\.reward_layers: 2, .*use 3"),
        (["lab.reward_from_policy=true"], r"prepare\.reward_heads: 2, .*use 3"),
        (
            ["task=preferences", "task.train_file=a", "task.eval_file=b", "lab.reward_auxiliary_steps=5"],
            r"lab\.reward_auxiliary_steps: 5, .*use 0",
        ),
        (["lab.reward_auxiliary_truth=true"], r"give lab\.reward_auxiliary_steps"),
        (
            ["lab.reward_auxiliary_truth=true", "lab.reward_auxiliary_steps=5"],
            r"use task\.reward_reads_prompt=true",
        ),
    ],
)
def test_additions_that_cannot_be_are_refused(words: Sequence[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(("experiment=demo", *words))


def test_the_command_names_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert worlds.main(["experiment=demo", "lab.reward_from_policy=maybe"]) == InputError.exit_code
    assert "lab.reward_from_policy: maybe: " in capsys.readouterr().err
