"""Every command in the documentation parses, and every file that it names exists."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from r2m_ray.__main__ import COMMANDS
from r2m_ray.config.compose import load_config
from r2m_ray.config.rules import validate
from r2m_ray.config.sweep import sweep

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
sys.path.insert(0, str(ROOT / "launch"))


def commands() -> list[str]:
    return [
        line
        for document in DOCUMENTS
        for block in BLOCK.findall(document.read_text())
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]


def check_overrides(command: str, arguments: list[str]) -> None:
    # The lab's own settings are not the configuration's.
    overrides = [word for word in arguments if "=" in word and not word.startswith("lab.")]
    if "--multirun" in arguments:
        configs = sweep(overrides)
        assert len({config.run.name for config in configs}) == len(configs) > 1
    elif command in ("train", "prepare"):
        configs = [load_config(overrides)]
    else:
        configs = [load_config(["experiment=demo", *overrides])]
    errors = [str(p) for config in configs for p in validate(config) if not p.warning]
    assert errors == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)((?:::\w+)*)`", document.read_text()))
    assert named or document.name != "reliability.md"
    for file, path in named:
        text = (ROOT / file).read_text()
        for part in path.split("::")[1:]:
            assert re.search(rf"^\s*(async )?(def|class) {part}\b", text, re.MULTILINE), f"{file}::{part}"


def test_the_functions_beside_the_papers_equations_exist() -> None:
    rows = re.findall(r"^\| Eq\. [^|]*\|([^|]*)\|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 7
    for row in rows:
        names = re.findall(r"`([\w.]+)`", row)
        module = (ROOT / "r2m_ray" / Path(*names[0].split(".")[:2])).with_suffix(".py").read_text()
        for name in names:
            last = name.split(".")[-1]
            assert re.search(rf"^\s*(def|class) {last}\b", module, re.MULTILINE), f"{name} in {row}"


@pytest.mark.parametrize("line", commands())
def test_a_documented_command_parses(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[0] == ".":
        made = re.search(r"^VENV := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert made is not None
        assert words[1] == f"{made[1]}/bin/activate"
    elif words[:2] == ["r2m-ray", "compare"]:
        arms = words[2 : words.index("--baseline")]
        assert words[words.index("--baseline") + 1] in {arm.partition("=")[0] for arm in arms}
    elif words[0] == "r2m-ray":
        assert words[1] in COMMANDS
        check_overrides(words[1], words[2:])
    elif words[:2] == ["python", "launch/submit.py"]:
        rest = words[words.index("--") + 1 :]
        check_overrides(rest[0], rest[1:])
    elif words[:2] == ["python", "-m"]:
        module = ROOT / Path(*words[2].split("."))
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        check_overrides("prepare", words[3:])
    else:
        assert words[0] == "python", f"{line}: a kind of command that no test knows"
        assert (ROOT / words[1]).is_file()


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 10


def test_every_path_and_function_of_the_readme_exists() -> None:
    text = DOCUMENTS[0].read_text()
    for path in re.findall(r"`(tests/[\w/]+\.py|launch/[\w.]+|r2m_ray/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path


def test_the_loop_in_the_readme_is_the_drivers() -> None:
    def squeezed(text: str) -> str:
        return re.sub(r"\s+", "", re.sub(r"#.*", "", text)).replace(",)", ")")

    shown = re.search(r"```python\n(for t in .*?)```", DOCUMENTS[0].read_text(), re.DOTALL)
    assert shown
    driver = squeezed((ROOT / "r2m_ray" / "driver" / "loop.py").read_text())
    for call in (
        "w=omega_at(config,t)",
        "rollout.sample(plans)",
        "advantages(config,rows,r0)",
    ):
        assert call in squeezed(shown[1])
        assert call in driver
    for call in re.findall(r"\w+\.(?:annotate|logprobs|update|sync)\([^()]*\)", shown[1]):
        assert squeezed(call) in driver, call
