"""Preparation by TRL: real models come out, the same ones from the same settings, kept by digest."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import Config
from r2m_ray.engines.text import conversation_ids
from r2m_ray.errors import InputError
from r2m_ray.tasks.prepare.store import Prepared, locate, prepare

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("few_measures")]

WORDS = ["apple", "bread", "cheese", "dates", "eggs", "figs", "grapes", "honey"]


def note2answer(root: Path, *overrides: str) -> Config:
    small = [
        "prepare.sft_rows=256",
        "prepare.sft_steps=12",
        "prepare.pair_rows=128",
        "prepare.reward_steps=8",
    ]
    return load_config(["experiment=demo", f"prepare.root={root}", *small, *overrides])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, few_measures: None) -> Prepared:
    return prepare(note2answer(tmp_path_factory.mktemp("prepared")))


def test_both_models_load_as_hugging_face_directories(prepared: Prepared) -> None:
    policy = AutoModelForCausalLM.from_pretrained(prepared.policy_dir)
    reward = AutoModelForSequenceClassification.from_pretrained(prepared.reward_dir)
    assert (policy.config.hidden_size, reward.config.hidden_size) == (96, 64)
    assert reward.config.num_labels == 1
    assert policy.config.vocab_size == len(AutoTokenizer.from_pretrained(prepared.policy_dir))


def test_training_lowers_both_losses(prepared: Prepared) -> None:
    losses = [[entry["loss"] for entry in prepared.facts[part]["losses"]] for part in ("policy", "reward")]
    # A policy that knows nothing loses log(vocabulary) ≈ 5 on each token.
    assert losses[0][0] > losses[0][-1] + 0.5
    assert losses[1][-1] < losses[1][0]


def test_the_reward_model_of_the_informative_world_never_sees_the_prompt(prepared: Prepared) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared.reward_dir)
    ids = conversation_ids(tokenizer, "the fox is red .", "the fox is blue .")
    assert tokenizer.decode(ids) == "<bos> the fox is blue . <eos>"


def test_the_same_settings_are_found_and_not_trained_again(prepared: Prepared) -> None:
    config = note2answer(prepared.directory.parent)
    before = (prepared.policy_dir / "model.safetensors").stat().st_mtime_ns
    assert prepare(config).directory == locate(config).directory == prepared.directory
    assert (prepared.policy_dir / "model.safetensors").stat().st_mtime_ns == before


def test_other_settings_are_other_models(prepared: Prepared) -> None:
    with pytest.raises(InputError, match="r2m-ray prepare"):
        locate(note2answer(prepared.directory.parent, "prepare.sft_steps=13"))
    with pytest.raises(InputError, match="r2m-ray prepare"):
        locate(note2answer(prepared.directory.parent, "run.seed=1"))


def test_the_command_that_is_missing_is_named(prepared: Prepared) -> None:
    wanted = note2answer(prepared.directory.parent, "task.reward_reads_prompt=true", "run.seed=3")
    with pytest.raises(InputError, match="make them by: r2m-ray prepare") as found:
        locate(wanted)
    command = str(found.value).partition("make them by: ")[2]
    with pytest.raises(InputError) as again:
        locate(load_config(shlex.split(command)[2:]))
    # The message names the directory, and so the digest of all settings.
    assert str(again.value) == str(found.value)


def test_a_missing_file_means_preparing_again_with_the_same_weights(
    prepared: Prepared, tmp_path: Path
) -> None:
    config = note2answer(tmp_path)
    damaged = shutil.copytree(prepared.directory, tmp_path / prepared.directory.name)
    (damaged / "reward" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no prepared models"):
        locate(config)
    assert prepare(config).directory == locate(config).directory == damaged
    for name in ("policy/model.safetensors", "reward/model.safetensors"):
        digests = {hashlib.sha256((d / name).read_bytes()).hexdigest() for d in (prepared.directory, damaged)}
        assert len(digests) == 1, name


def test_of_two_at_once_one_trains_and_both_find_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = note2answer(tmp_path, "prepare.sft_steps=1", "prepare.reward_steps=0")
    with pytest.raises(InputError) as missing:
        locate(config)
    name = str(missing.value).partition(":")[0].rpartition("/")[2]
    leftover = tmp_path / f".tmp-{name}" / "policy"
    leftover.mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(prepare, [config, config]))
    assert made[0] == made[1]
    assert capsys.readouterr().out.count("policy: step 1 of 1") == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [name]


def test_preferences_are_learned_and_every_row_is_accounted_for(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"which is better {a} or {b} ?", "chosen": f"{a} yes", "rejected": f"{b} no"}
        for a in WORDS
        for b in WORDS
        if a != b
    ]
    rows += [{"prompt": "same ?", "chosen": "x", "rejected": "x"}]
    rows += [{"prompt": "long " * 300, "chosen": "yes", "rejected": "no"}]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = prepare(
        load_config(
            [
                "experiment=preferences_tiny",
                f"prepare.root={tmp_path}",
                f"task.train_file={data}",
                f"task.eval_file={data}",
                "prepare.vocabulary=300",
                "prepare.sft_steps=4",
                "prepare.reward_steps=25",
                "prepare.reward_learning_rate=3e-3",
                "reward.max_length=256",
            ]
        )
    )
    # Every chosen response ends in "yes" and every rejected one in "no".
    assert made.facts["reward"]["accuracy"] > 0.95
    for counts in made.facts["rows"].values():
        assert (
            counts["rows"]
            == len(rows)
            == counts["used"]
            + sum(count for reason, count in counts.items() if reason not in ("rows", "used"))
        )
        assert counts["equal responses"] == 1
