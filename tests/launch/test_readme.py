"""Every command that the launch files document parses, and its configuration composes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from scripts import load_script

from r2m_ray.cli.checks.preflight import exposure_problems
from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import ClusterConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "launch" / "README.md").read_text()
SLURM = (ROOT / "launch" / "slurm.sh").read_text()
SPANS = re.findall(r"`((?:r2m-ray|python|sbatch|docker) [^`]+)`", README)
EXAMPLE = re.sub(r"\\\n#\s*", "", SLURM.split("#\n", 1)[1])
EXAMPLES = re.findall(r"^# +(sbatch .+)$", EXAMPLE, re.MULTILINE)
SUBMITTED = re.findall(
    r"^ +(python launch/submit.py .+)$", (ROOT / "launch" / "submit.py").read_text(), re.MULTILINE
)


def composes(words: list[str]) -> None:
    assert words[0] == "train"
    load_config(words[1:])


@pytest.mark.parametrize("line", [*SPANS, *EXAMPLES, *SUBMITTED])
def test_a_documented_command_parses(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "r2m-ray":
        composes(words[1:])
    elif words[0] == "python":
        submit = load_script(ROOT / words[1])
        options, command = submit._arguments(words[2:])
        assert options.address == "http://head:8265"
        composes(command)
    elif words[0] == "sbatch":
        script = words.index("launch/slurm.sh")
        assert all(word.startswith("--") for word in words[1:script])
        composes(words[script + 1 :])
    elif words[:2] == ["docker", "build"]:
        arguments = [word.partition("=")[0] for word in words if "=" in word]
        assert all(f"ARG {name}=" in (ROOT / "Dockerfile").read_text() for name in arguments)
    else:
        image = next(i for i, word in enumerate(words) if word.startswith("r2m-ray"))
        assert 'ENTRYPOINT ["r2m-ray"]' in (ROOT / "Dockerfile").read_text()
        composes(words[image + 1 :])


def test_there_are_commands_to_check() -> None:
    assert len(SPANS) == 7
    assert len(EXAMPLES) == 1
    assert len(SUBMITTED) == 1


def test_slurm_warns_early_enough_for_the_default_grace() -> None:
    warning = re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", SLURM, re.MULTILINE)
    assert warning is not None
    assert ClusterConfig().stop_grace_s < int(warning[1]) - 30
    assert warning[1] in README


def test_the_token_that_slurm_makes_satisfies_the_check(tmp_path: Path) -> None:
    assert "export RAY_AUTH_MODE=token\n" in SLURM
    assert "cluster.address=auto" in SLURM
    (tmp_path / ".ray").mkdir(mode=0o700)
    (tmp_path / ".ray" / "auth_token").touch(mode=0o600)
    (tmp_path / ".ray" / "auth_token").write_text("canary")
    environment = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    assert exposure_problems(ClusterConfig(address="auto"), environment) == []
