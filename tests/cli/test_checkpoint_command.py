"""`r2m-ray checkpoint`, and that nothing in a checkpoint is ever unpickled (requirement 31)."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from r2m_ray.__main__ import main
from r2m_ray.config.schema import Config
from r2m_ray.engines.reward.engine import RewardEngine
from r2m_ray.engines.reward.head_files import load_head
from r2m_ray.run import commit
from r2m_ray.run.checkpoint import Checkpoints, fault

WIDTH = 64


class Policy:
    """The policy's files as the learner writes them, of a real model; only what `export` and `load` read."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir

    async def save(self, directory: Path) -> None:
        AutoModelForCausalLM.from_pretrained(self.model_dir).save_pretrained(directory / "policy")
        AutoTokenizer.from_pretrained(self.model_dir).save_pretrained(directory / "policy")
        (directory / "policy_state").mkdir()
        (directory / "policy_state" / "optimizer.json").write_text("{}")

    async def load(self, directory: Path) -> None:
        AutoModelForCausalLM.from_pretrained(directory / "policy")
        AutoTokenizer.from_pretrained(directory / "policy")


class Reward:
    """The real reward engine."""

    def __init__(self, model_dir: Path) -> None:
        self.engine = RewardEngine(
            config=Config(),
            model_dir=str(model_dir),
            policy_width=WIDTH,
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
        )

    async def save(self, directory: Path) -> None:
        self.engine.save(directory)

    async def load(self, directory: Path) -> None:
        self.engine.load(directory)


@pytest.fixture(scope="module")
def roles(tiny_policy_dir: Path, tiny_reward_dir: Path) -> Any:
    return SimpleNamespace(policy=Policy(tiny_policy_dir), reward=Reward(tiny_reward_dir))


@pytest.fixture(scope="module")
def original(roles: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "config.yaml").write_text("run: {name: demo}\n")
    for step in (1, 2):
        checkpoints = Checkpoints(directory / "checkpoints", keep=2)
        asyncio.run(checkpoints.save(step, roles))
    return directory


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


def command(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


def damage(run: Path, step: int) -> None:
    os.truncate(run / f"checkpoints/step-{step:06d}/policy/model.safetensors", 1000)


def test_list_shows_every_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 1)
    weights = run / "checkpoints/step-000002/policy/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    step = run / "checkpoints/step-000002"
    os.utime(step, (os.stat(step).st_mtime - 7200,) * 2)
    size = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
    assert command("list", run) == 0
    lines = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["step", "1", "2"]
    assert lines[1][4].startswith("damaged: policy/model.safetensors has 1000 bytes, its manifest says ")
    assert lines[2] == ["2", f"{size:,}", "2", "h", "complete"]
    # A changed bit is seen by those who look at every byte.
    assert command("list", run, "--verify") == 0
    assert "damaged: policy/model.safetensors does not match its sha256" in capsys.readouterr().out


def test_verify_names_file_and_reason(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("verify", run) == 0
    assert capsys.readouterr().out.count(": valid\n") == 2
    damage(run, 2)
    (run / "checkpoints/step-000001/notes\x1b.txt").touch()
    assert command("verify", run) == 3
    printed = capsys.readouterr()
    path = run / "checkpoints/step-000002"
    assert printed.err.startswith(
        f"error: {path}: policy/model.safetensors has 1000 bytes, its manifest says "
    )
    assert "notes\\x1b.txt is not of the checkpoint, and never read" in printed.out
    assert command("verify", run, 1) == 0
    assert command("verify", run, 2) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "RUN", "7"], "no checkpoint of step 7; there are those of 1, 2"),
        (["export", "RUN", "OUT", "--step", "7"], "no checkpoint of step 7"),
        (["list", "RUN/checkpoints"], "not the directory of a run"),
        (["export", "RUN", "RUN"], "exists already; give a new directory"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], words: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": str(run), "OUT": str(tmp_path / "out"), "RUN/checkpoints": str(run / "checkpoints")}
    assert command(*(places.get(argument, argument) for argument in arguments)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("action", [["list"], ["verify"], ["export", "OUT"]])
def test_a_run_without_checkpoints_is_told(
    action: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    assert command(action[0], run, *(str(tmp_path / "out") for _ in action[1:])) == 2
    assert "no checkpoint; the run has not committed one yet" in capsys.readouterr().err


def test_an_export_is_a_model_and_a_head(
    run: Path, roles: Any, tmp_path: Path, tiny_policy_dir: Path
) -> None:
    (run / "checkpoints/step-000002/policy/unlisted.txt").touch()
    assert command("export", run, tmp_path / "deep" / "out") == 0
    out = tmp_path / "deep" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["MANIFEST.json", "policy", "reward_head"]
    assert not (out / "policy/unlisted.txt").exists()
    assert commit.fault(out) is None
    assert commit.read_manifest(out).step == 2
    exported = AutoModelForCausalLM.from_pretrained(out / "policy").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tiny_policy_dir).state_dict().items():
        assert torch.equal(exported[name], tensor), name
    assert AutoTokenizer.from_pretrained(out / "policy")("w5 w6").input_ids == [9, 10]
    head, info = load_head(out / "reward_head")
    assert info.policy_width == WIDTH
    for name, tensor in roles.reward.engine.head.state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor), name


def test_an_export_takes_the_newest_valid_or_the_step_it_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run, 2)
    assert command("export", run, tmp_path / "newest") == 0
    assert commit.read_manifest(tmp_path / "newest").step == 1
    assert command("export", run, tmp_path / "damaged", "--step", 2) == 3
    assert "not exported: policy/model.safetensors has 1000 bytes" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newest", "run"]


# Requirement 31


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


class Watch:
    """The pickles that were loaded while it looked; an audit hook cannot be removed, but can be idle."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[tuple[Any, ...]] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "pickle.find_class":
            self.seen.append(arguments)

    def __enter__(self) -> Watch:
        self.on = True
        return self

    def __exit__(self, *_: object) -> None:
        self.on = False


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def plant(checkpoint: Path, canary: Path, *, listed: bool) -> None:
    """Put pickles that run a command beside the real files, under the names that libraries look for."""
    bomb = pickle.dumps(Bomb(canary))
    names = [
        "evil.pkl",
        "policy/pytorch_model.bin",
        "policy/training_args.bin",
        "policy/model.pt",
        "policy_state/optimizer.pt",
        "policy_state/optimizer-00009.pkl",
        "reward_head/head.bin",
        "reward_head/optimizer.pt",
    ]
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    for name in names:
        (checkpoint / name).write_bytes(bomb)
        if listed:
            entry = {"bytes": len(bomb), "sha256": commit.sha256(checkpoint / name)}
            manifest["files"][name] = entry
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("listed", [False, True])
def test_a_pickle_in_a_checkpoint_is_never_run(
    run: Path, roles: Any, tmp_path: Path, watch: Watch, listed: bool
) -> None:
    canary = tmp_path / "canary"
    plant(run / "checkpoints/step-000002", canary, listed=listed)
    assert fault(run / "checkpoints/step-000002") is None
    with watch:
        assert command("list", run, "--verify") == 0
        assert command("verify", run) == 0
        assert command("export", run, tmp_path / "out") == 0
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "policy")
        load_head(tmp_path / "out" / "reward_head")
        step = asyncio.run(Checkpoints(run / "checkpoints", keep=2).restore(roles))
    assert step == 2
    assert not canary.exists()
    assert watch.seen == []


def test_the_bomb_and_the_watch_work(tmp_path: Path, watch: Watch) -> None:
    with watch:
        pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))  # noqa: S301 (our own)
    assert (tmp_path / "canary").exists()
    assert [module for module, _ in (arguments[:2] for arguments in watch.seen)] == [os.system.__module__]
    watch.seen.clear()
