"""A lab whose runs are written by a small script, so that its decisions are tested without any training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import save_model
from omegaconf import OmegaConf
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.overoptimization import lab as lab_module
from benchmarks.overoptimization.arms import arms_named
from benchmarks.overoptimization.information import Explained, Information, Regime
from benchmarks.overoptimization.lab import Lab
from benchmarks.overoptimization.presets import Part, Preset, World
from r2m_ray.config.schema import Config
from r2m_ray.run.resume import flat_config
from r2m_ray.tasks.note2answer import world as note2answer
from r2m_ray.tasks.prepare.store import Prepared

WORLD = World(name="toy", regime=Regime.informative, overrides=("experiment=demo", "algo.steps=10"))
GOOD = [1.0, 1.3, 1.5, 1.4, 1.2, 1.0, 0.9, 0.8, 0.8, 0.7, 0.6]
"""Gold that passes the baseline's gate: it peaks at a fifth of the run and falls by .9."""

SCRIPT = """
import json, os, pathlib, sys
root = pathlib.Path(os.environ["LAB_TEST"])
words = dict(word.partition("=")[::2] for word in sys.argv[1:])
name = words["run.name"]
with (root / "order").open("a") as order:
    order.write(name + (" again" if words.get("run.resume") else "") + "\\n")
plans = json.loads((root / "plan.json").read_text())
plan = plans.get(name, plans.get(name.rsplit("-seed-")[0], {}))
directory = pathlib.Path(words["run.root"].strip("'")) / name
directory.mkdir(exist_ok=True)
seed = name.rsplit("-")[-1]
(directory / "config.yaml").write_text((root / "config.yaml").read_text().replace("SEED", seed))
(directory / "environment.json").write_text((root / "environment.json").read_text())
(directory / "rollouts.jsonl").write_text("")
gold, last = plan.get("gold", plans["gold"]), plan.get("last", 10)
if words.get("run.resume"):
    last = 10
with (directory / "metrics.jsonl").open("w") as metrics:
    for t in range(last + 1):
        rows = [{"step": t, "kind": "eval", "gold/mean": gold[t] + int(seed) / 10, "kl/sequence": float(t),
                 "reward/mean": t / 2, "reward/frozen_mean": t / 3, "pairs/accuracy": 0.6 + t / 100,
                 "pairs/frozen_accuracy": 0.7}]
        if t:
            rows.insert(0, {"step": t, "kind": "step", "time/step": 2.0 if "r2m" in name else 1.0,
                            "time/reward": 0.5, "alarm/kl": float(t >= plan.get("alarm", 99))})
        metrics.writelines(json.dumps(row) + "\\n" for row in rows)
print("words of the run")
sys.exit(plan.get("code", 0) if not words.get("run.resume") else 0)
"""


@pytest.fixture
def make_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Lab]:
    """``make_lab()``, and by name: arms, seeds, despite_gates, and what is wrong with the world.

    plan: of arms or single runs, how they go: ``gold`` by step, ``last`` step, exit ``code``, the
    step of an ``alarm``. accuracy: the reward model's. gain: of h, in R².
    """
    home = tmp_path / "fake"
    home.mkdir()
    (home / "train.py").write_text(SCRIPT)
    config = Config()
    config.algo.steps = 10
    text = OmegaConf.to_yaml(OmegaConf.structured(config)).replace("  seed: 0", "  seed: SEED")
    (home / "config.yaml").write_text(text)
    keys = ("started", "command", "python", "platform", "cpu", "cores", "memory_bytes", "accelerators",
            "commit", "packages")  # fmt: skip
    (home / "environment.json").write_text(json.dumps({"starts": [dict.fromkeys(keys, "")]}))
    monkeypatch.setenv("LAB_TEST", str(home))
    monkeypatch.setattr(lab_module, "TRAIN", (sys.executable, "-S", str(home / "train.py")))
    monkeypatch.setattr(lab_module, "run_identity", identity)

    def made(
        *,
        arms: tuple[str, ...] = ("rloo", "rloo_r2m"),
        seeds: tuple[int, ...] = (0,),
        despite_gates: bool = False,
        plan: dict[str, Any] | None = None,
        accuracy: float = 0.7,
        gain: float = 0.2,
    ) -> Lab:
        (home / "plan.json").write_text(json.dumps({"gold": GOOD, **(plan or {})}))
        facts = {
            "policy": {"gold": 1.1, "correction_rate": 0.4},
            "reward": {"accuracy": accuracy},
            "demonstrator": {"correction_rate": 0.6},
        }

        def prepare(lab: Lab, world: World, overrides: dict[str, Any]) -> dict[str, Prepared]:
            return {name: Prepared(directory=tmp_path / name, facts=facts) for name in overrides}

        def precheck(config: Config, prepared: Prepared, prompts: int, responses: int) -> Information:
            with (home / "prechecks").open("a") as calls:
                calls.write(f"{prepared.directory.name} {prompts} {responses}\n")
            low, high = (
                Explained(gold=0.3, differences=0.3),
                Explained(gold=0.3 + gain, differences=0.3 + gain),
            )
            return Information(reward_model=low, policy=low, both=high)

        monkeypatch.setattr(lab_module, "prepare", prepare)
        part = Part(world=WORLD, arms=arms_named(arms), seeds=seeds)
        return Lab(
            preset=Preset(name="test", parts=(part,)),
            root=tmp_path / "root",
            jobs=1,
            precheck=precheck,
            despite_gates=despite_gates,
        )

    return made


def identity(config: Config) -> dict[str, Any]:
    """What a run is made of, without models."""
    return {"config": flat_config(config), "content": {}, "versions": {}}


@pytest.fixture
def order(tmp_path: Path) -> Callable[[], list[str]]:
    """The runs that were started since the last call, in order."""

    def started() -> list[str]:
        file = tmp_path / "fake" / "order"
        names = file.read_text().splitlines() if file.is_file() else []
        file.unlink(missing_ok=True)
        return names

    return started


@pytest.fixture(scope="package")
def tiny_prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Random models of two layers that read and write the words of note2answer; no test may write there."""
    directory = tmp_path_factory.mktemp("world")
    tokenizer = note2answer.tokenizer()
    for name, width, kind in (
        ("policy", 32, LlamaForCausalLM),
        ("reward", 24, LlamaForSequenceClassification),
    ):
        save_model(directory / name, kind, tokenizer=tokenizer, width=width, num_labels=1)
    return Prepared(directory=directory, facts={})


@pytest.fixture
def tiny_config() -> Config:
    """What those models are read by; a test may change it."""
    config = Config()
    config.task.max_new_tokens = 12
    return config
