"""Similarity by layer: the states are the models' own, and a layer made to know gold stands out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from benchmarks.overoptimization import layers as layers_module
from benchmarks.overoptimization.layers import (
    INITIAL,
    PANELS,
    TRAINED,
    Layers,
    Reading,
    distinct,
    layers,
    main,
    picture,
    policy_states,
    reward_states,
    trained_policy,
)
from benchmarks.overoptimization.precheck import head_rows, pooled
from benchmarks.overoptimization.samples import Samples, load_policy, sample
from benchmarks.overoptimization.similarity import Similarity, halves, similarity
from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import Config, FeedbackConfig
from r2m_ray.engines.text import conversation_ids, policy_prompt_ids, policy_response_ids
from r2m_ray.errors import InputError
from r2m_ray.run import commit
from r2m_ray.tasks.note2answer import world as note2answer
from r2m_ray.tasks.prepare.measurement import prepared_trunk, seeded
from r2m_ray.tasks.prepare.store import Prepared

GOOD, BAD = "the fox is red .", "the fox is blue ."


@pytest.fixture
def drawn(tiny_config: Config, tiny_prepared: Prepared) -> Samples:
    """Responses of different lengths, so that padding is there to be read by mistake."""
    policy, tokenizer = load_policy(tiny_prepared.policy_dir)
    with seeded(0):
        samples = sample(tiny_config, policy, tokenizer, "test", 6, 4)
    assert len({len(response.split()) for response in samples.responses}) > 1
    return samples


def test_the_last_layer_is_the_mean_of_the_policys_last_hidden_state(
    tiny_config: Config, tiny_prepared: Prepared, drawn: Samples
) -> None:
    policy, tokenizer = load_policy(tiny_prepared.policy_dir)
    states_LNP = policy_states(policy, tokenizer, drawn)
    own = AutoModelForCausalLM.from_pretrained(tiny_prepared.policy_dir)
    assert states_LNP.shape == (3, 24, 32)
    for n, (prompt, response) in enumerate(zip(drawn.prompts, drawn.responses, strict=True)):
        start, end = policy_prompt_ids(tokenizer, prompt), policy_response_ids(tokenizer, response)
        row = torch.tensor([start + end[:-1]])
        with torch.no_grad():
            last_SP = own.model(input_ids=row).last_hidden_state[0].double().numpy()
            word_SP = own.get_input_embeddings()(row)[0].double().numpy()
        # One state predicts each token of the response, its end included.
        assert states_LNP[-1, n] == pytest.approx(last_SP[-len(end) :].mean(0), abs=1e-5)
        assert states_LNP[0, n] == pytest.approx(word_SP[-len(end) :].mean(0), abs=1e-6)


def test_the_precheck_pools_the_same_states(
    tiny_config: Config, tiny_prepared: Prepared, drawn: Samples
) -> None:
    policy, tokenizer = load_policy(tiny_prepared.policy_dir)
    rows = [*head_rows(tiny_config, policy, tokenizer, drawn)]
    feature_NF = pooled(rows, torch.randn(1, 32)).double().numpy()
    last_NP = policy_states(policy, tokenizer, drawn)[-1]
    assert feature_NF[:, :32] == pytest.approx(last_NP, abs=1e-6)

    blind = replace(tiny_config, feedback=FeedbackConfig(noise=1.0))
    noised = torch.cat([row for _, row in head_rows(blind, policy, tokenizer, drawn)])
    states = torch.cat([row for _, row in rows])
    # Of h it keeps the mean and the spread of each of its dimensions, and nothing of any token.
    assert float((noised.mean(0) - states.mean(0)).abs().max()) < 0.3 * float(states.std())
    correlation = torch.corrcoef(torch.stack([noised.flatten(), (states - states.mean(0)).flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.02


def test_the_reward_models_last_layer_is_what_its_score_is_read_from(
    tiny_config: Config, tiny_prepared: Prepared, drawn: Samples
) -> None:
    trunk = prepared_trunk(tiny_config, tiny_prepared.reward_dir)
    states_LNP = reward_states(trunk, drawn)
    rte_ND, score_N = trunk.read(drawn.prompts, drawn.responses)
    assert states_LNP.shape == (3, 24, 24)
    assert states_LNP[-1] == pytest.approx(rte_ND.double().numpy(), abs=1e-5)
    assert trunk.score(torch.tensor(states_LNP[-1]).float()).tolist() == pytest.approx(
        score_N.tolist(), abs=1e-5
    )
    ends = [
        conversation_ids(trunk.tokenizer, *row)[-1]
        for row in zip(drawn.prompts, drawn.responses, strict=True)
    ]
    assert set(ends) == {trunk.tokenizer.eos_token_id}, "so the embeddings are all one"
    assert states_LNP[0].std(0) == pytest.approx(0, abs=1e-12)


def test_a_layer_that_is_made_to_know_gold_shows_it(tiny_config: Config, tiny_prepared: Prepared) -> None:
    """Answers differ in one word, and that word in one small number that the last layer makes a large one."""
    policy, tokenizer = load_policy(tiny_prepared.policy_dir)
    prompts = note2answer.prompts(0, "test", 8, 6)
    tails = ["", " really", " hope", " sorry"]
    rows = [(prompt, answer + tail) for prompt in prompts for answer in (GOOD, BAD) for tail in tails]
    samples = Samples(
        prompts=[prompt for prompt, _ in rows],
        responses=[response for _, response in rows],
        gold_N=np.array([float(response.startswith(GOOD)) for _, response in rows]),
        prompt_N=np.repeat(np.arange(8), 8),
    )
    red, blue = tokenizer.convert_tokens_to_ids(["red", "blue"])
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()  # So a layer hands on what it gets.
        word_VP = policy.get_input_embeddings().weight
        word_VP[red] = word_VP[blue]
        word_VP[:, 0] = 0.0
        word_VP[red, 0], word_VP[blue, 0] = 0.01, -0.01
    policy.base_model.layers[1].register_forward_hook(
        lambda module, args, state_BTP: torch.cat([1e3 * state_BTP[..., :1], state_BTP[..., 1:]], -1)
    )
    states_LNP = policy_states(policy, tokenizer, samples)
    label_N = halves(samples.gold_N, samples.prompt_N)
    found = similarity(states_LNP, label_N, samples.prompt_N, within_prompts=True)
    assert (found.same_pairs, found.different_pairs) == (8 * 12, 8 * 16)
    # Of the same label all pairs have different tails, of different ones only 12 in 16.
    assert found.difference_L[1] == pytest.approx(found.difference_L[0], abs=1e-9)
    assert found.difference_L[0] < 0
    # That word is one of 6 or 7 tokens of about orthogonal states: ±1/6 to ±1/7, less what the tails take.
    assert 0.2 < found.difference_L[2] < 1 / 3
    across = similarity(states_LNP, label_N, samples.prompt_N, within_prompts=False)
    assert across.difference_L[:2] == pytest.approx([0.0, 0.0], abs=1e-4)
    assert 0.2 < across.difference_L[2] < 1 / 3


def test_a_repeated_response_counts_once() -> None:
    samples = Samples(
        prompts=["a", "a", "a", "b", "b"],
        responses=["x", "y", "x", "x", "x"],
        gold_N=np.array([1.0, 2.0, 1.0, 3.0, 3.0]),
        prompt_N=np.array([0, 0, 0, 1, 1]),
    )
    kept = distinct(samples)
    assert (kept.prompts, kept.responses) == (["a", "a", "b"], ["x", "y", "x"])
    assert kept.gold_N.tolist() == [1.0, 2.0, 3.0]
    assert kept.prompt_N.tolist() == [0, 0, 1]


def test_the_same_seed_finds_the_same(tiny_config: Config, tiny_prepared: Prepared) -> None:
    first, again = (layers(tiny_config, tiny_prepared, tiny_prepared.policy_dir, 32, 8) for _ in range(2))
    for _, read in PANELS:
        assert read(first).same_L.tolist() == read(again).same_L.tolist()
        assert len(read(first).same_L) == 3
    assert first.gold == again.gold
    with pytest.raises(InputError, match="0 pairs of the same label"):
        layers(tiny_config, tiny_prepared, tiny_prepared.policy_dir, 1, 2)


def reading(*difference: float) -> Reading:
    one = Similarity(
        same_L=0.5 + np.array(difference),
        different_L=np.full(len(difference), 0.5),
        same_pairs=3,
        different_pairs=4,
    )
    return Reading(within=one, across=one)


def test_the_picture_has_every_seed_and_the_mean() -> None:
    def found(value: float) -> Layers:
        return Layers(gold=0.0, different=1.0, policy=reading(0.0, value), reward_model=reading(value, 0.0))

    figure = picture({0: {INITIAL: found(0.1), TRAINED: found(0.4)}, 1: {INITIAL: found(0.3)}})
    within, _, reward, _ = figure.axes
    assert within.get_title(loc="left") == "Policy, within prompts"
    zero, *lines = within.get_lines()
    assert zero.get_ydata() == [0, 0]
    assert [line.get_linewidth() for line in lines] == [0.9, 0.9, 1.9, 0.9, 1.9]
    assert [line.get_ydata()[1] for line in lines] == pytest.approx([0.1, 0.3, 0.2, 0.4, 0.4])
    assert [line.get_ydata()[0] for line in reward.get_lines()[1:]] == pytest.approx(
        [0.1, 0.3, 0.2, 0.4, 0.4]
    )
    assert [text.get_text() for text in within.get_legend().get_texts()] == [INITIAL, TRAINED]


@pytest.fixture
def run(tiny_config: Config, tiny_prepared: Prepared, tmp_path: Path) -> Path:
    """A run of seed 1 in that world: a checkpoint of step 7, whose policy has other embeddings."""
    config = Config()
    config.run.seed = 1
    config.model.policy = str(tiny_prepared.policy_dir)
    config.model.reward = str(tiny_prepared.reward_dir)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000007"
    policy, tokenizer = load_policy(tiny_prepared.policy_dir)
    with torch.no_grad():
        policy.get_input_embeddings().weight.mul_(2.0)
    policy.save_pretrained(checkpoint / "policy")
    tokenizer.save_pretrained(checkpoint / "policy")
    (checkpoint / "reward_head").mkdir()
    (checkpoint / "reward_head" / "head.json").write_text("{}")
    (checkpoint / "driver.json").write_text(json.dumps({"step": 7, "prompts": {}, "identity": {}}))
    commit.seal(checkpoint, step=7)
    (tmp_path / "run" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return tmp_path / "run"


@pytest.fixture
def prepared_worlds(tiny_config: Config, tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every seed's world is the tiny one, and none is trained."""
    monkeypatch.setattr(layers_module, "prepare", lambda words: tiny_prepared)


@pytest.mark.usefixtures("prepared_worlds")
def test_the_command_writes_numbers_and_a_picture(
    tiny_config: Config, tiny_prepared: Prepared, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found" / "layers.json"
    words = ["experiment=demo", "task.max_new_tokens=12", "--seeds", "0", "1", "--prompts", "32"]
    assert main([*words, "--responses", "8", "--run", str(run), "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert (written["prompts"], written["responses"]) == (32, 8)
    assert {seed: [*one] for seed, one in written["seeds"].items()} == {
        "0": [INITIAL],
        "1": [INITIAL, TRAINED],
    }
    trained = written["seeds"]["1"][TRAINED]
    assert trained["source"] == str(run / "checkpoints" / "step-000007" / "policy")
    config = load_config([*words[:2], "run.seed=1"])
    own = layers(config, tiny_prepared, Path(trained["source"]), 32, 8)
    within = trained["policy"]["within"]
    assert within["difference"] == pytest.approx(own.policy.within.difference_L)
    assert within["same_pairs"] == own.policy.within.same_pairs
    assert np.subtract(within["same"], within["different"]) == pytest.approx(within["difference"])
    assert trained["reward_model"]["across"]["same"] == pytest.approx(own.reward_model.across.same_L)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("prepared_worlds")
def test_a_run_that_does_not_belong_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "layers.json")

    def refusal(*words: str) -> str:
        assert main(["experiment=demo", *words]) == InputError.exit_code
        return capsys.readouterr().err

    assert "it is of seed 1, and no such seed is measured" in refusal(
        "--seeds", "0", "--run", str(run), "--out", out
    )
    assert "so is" in refusal("--seeds", "1", "--run", str(run), str(run), "--out", out)
    assert "a name that ends in .json" in refusal("--out", "picture.png")
    saved = OmegaConf.load(run / "config.yaml")
    saved.model.policy = saved.model.reward
    OmegaConf.save(saved, run / "config.yaml")
    assert f"it started from {saved.model.policy} and not from" in refusal(
        "--seeds", "1", "--run", str(run), "--out", out
    )
    saved.model.policy = "prepared"
    OmegaConf.save(saved, run / "config.yaml")
    words = [f"prepare.root={tmp_path}", "--seeds", "1", "--run", str(run), "--out", out]
    assert "its world is another one" in refusal(*words)
    assert not Path(out).exists()


def test_a_run_without_a_checkpoint_is_refused(
    tiny_config: Config, tiny_prepared: Prepared, run: Path
) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="has no checkpoint"):
        trained_policy(run, tiny_config, tiny_prepared)
