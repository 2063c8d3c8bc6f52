"""Secrets stay in the environment: no file, print, command line or runtime_env of ours holds one."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from ranks import run_python
from scripts import load_script

from r2m_ray.config.schema import Config
from r2m_ray.errors import HIDDEN, redacted, redacted_command
from r2m_ray.runtime.device import actor_environment

SUBMIT = Path(__file__).resolve().parents[2] / "launch" / "submit.py"
TRAIN = ("train", "experiment=demo", "run.root=/shared/runs", "prepare.root=/shared/prepared")
NAMES = ("WANDB_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "DB_PASSWORD", "MY_SECRET", "AWS_SECRET_ACCESS_KEY")
CANARIES = {name: f"canary{n}{'0123456789' * 4}"[:40] for n, name in enumerate(NAMES)}

RUN = """
import sys
from pathlib import Path
from omegaconf import OmegaConf
from r2m_ray.config.compose import load_config
from r2m_ray.run.log import RunLog

directory, *overrides = sys.argv[1:]
config = load_config(overrides)
text = OmegaConf.to_yaml(OmegaConf.structured(config))
with RunLog(Path(directory), config=config, resolved_yaml=text) as log:
    log.message("started")
    log.step(1, {"a": 1.0}, [{"step": 1, "response": "x"}])
    log.evaluation(1, {"a": 1.0})
"""


def test_no_canary_reaches_a_run_directory_or_the_screen(tmp_path: Path) -> None:
    # W&B's offline folder included; an override that carries a secret is kept without it.
    given = [f"+policy.deepspeed.note{n}={value}" for n, value in enumerate(CANARIES.values())]
    run = ["-c", RUN, tmp_path / "run", "experiment=demo", *given]
    stdout, stderr = run_python(*run, **CANARIES, HOME=str(tmp_path / "home"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "environment.json", "metrics.jsonl"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    texts = {str(path): path.read_bytes() for path in files} | {
        "stdout": stdout.encode(),
        "stderr": stderr.encode(),
    }
    held = [
        (place, name) for place, text in texts.items() for name in NAMES if CANARIES[name].encode() in text
    ]
    assert held == []
    assert f"note0: {HIDDEN}" in (tmp_path / "run" / "config.yaml").read_text()


def test_actors_are_given_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    for gpus in (0.0, 1.0):
        text = json.dumps(actor_environment(Config(), gpus))
        assert not any(value in text or name in text for name, value in CANARIES.items())


# launch/submit.py


@pytest.fixture(scope="module")
def submit() -> ModuleType:
    return load_script(SUBMIT)


def test_a_submission_carries_nothing_of_the_environment(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    assert submit.main(["--dry-run", "--", *TRAIN]) == 0
    printed = capsys.readouterr()
    assert not any(value in printed.out + printed.err for value in CANARIES.values())


@pytest.mark.parametrize(
    ("runtime_env", "override"),
    [
        ("env_vars: {WANDB_API_KEY: %s}", ""),
        ("env_vars: {NOTE: %s}", ""),
        ("pip: ['--extra-index-url', 'https://me:%s@host/simple']", ""),
        ("config: {hub: {api_key: %s}}", ""),
        ("{}", "+policy.deepspeed.note=%s"),
        ("{}", "+policy.deepspeed.hub_token=other-%s"),
    ],
)
def test_a_secret_in_a_submission_is_refused_without_showing_it(
    runtime_env: str,
    override: str,
    submit: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    canary = CANARIES["MY_SECRET"]
    monkeypatch.setenv("MY_SECRET", canary)
    file = tmp_path / "env.yaml"
    file.write_text(runtime_env.replace("%s", canary))
    command = [*TRAIN, *([override.replace("%s", canary)] if override else [])]
    assert submit.main(["--dry-run", "--runtime-env", str(file), "--", *command]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "would be shown and stored by the cluster" in printed.err
    assert canary not in printed.err


# Redaction


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("api_key=abc", f"api_key={HIDDEN}"),
        ("password: 'a b'", f"password: {HIDDEN}"),
        ("https://me:pw@host/x", f"https://{HIDDEN}@host/x"),
        ("task.max_new_tokens=48", "task.max_new_tokens=48"),
        ("tokenizer: gpt", "tokenizer: gpt"),
        ("token:\n  nested: 1", "token:\n  nested: 1"),
    ],
)
def test_redaction_hides_values_and_nothing_else(text: str, kept: str) -> None:
    assert redacted(text) == kept


def test_a_secret_after_its_flag_is_hidden() -> None:
    line = ["x", "--api-key", "abc", "--steps", "3"]
    assert redacted_command(line) == ["x", "--api-key", HIDDEN, "--steps", "3"]
