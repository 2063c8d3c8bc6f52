"""Pickles are never opened, wherever they lie: an audit hook watches loading, and a lint the source."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import run_python

PACKAGE = Path(__file__).resolve().parents[2] / "r2m_ray"
SOURCES = [*sorted(PACKAGE.rglob("*.py")), *sorted((PACKAGE.parent / "launch").glob("*.py"))]
PICKLES = (
    "pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "tokenizer.pkl", "adapter_model.bin",
)  # fmt: skip

LOAD = """
import sys
from pathlib import Path

opened = []

def watch(event, arguments):
    if event in ("pickle.find_class", "os.system"):
        opened.append(f"{event} {arguments}")

sys.addaudithook(watch)

import torch
from transformers import AutoTokenizer
from r2m_ray.config.schema import TaskConfig
from r2m_ray.tasks.data import load_preferences
from r2m_ray.errors import InputError
from r2m_ray.engines.policy.causal import load_causal
from r2m_ray.engines.reward.trunk import RewardTrunk

root = Path(sys.argv[1])
cpu = torch.device("cpu")
opened.clear()  # What the libraries do to themselves while they are imported is not about our files.

def policy(directory):
    load_causal(directory, field="model.policy", dtype=torch.float32, attention="sdpa", device=cpu)
    AutoTokenizer.from_pretrained(directory, trust_remote_code=False)

def reward(directory):
    RewardTrunk(
        model_dir=directory, dtype=torch.float32, attention="sdpa", score_layer="score", max_length=64,
        tokens_per_microbatch=64, device=cpu,
    )

def data(name):
    load_preferences(name, TaskConfig(), split="train")

def refused(load, name):
    try:
        load(str(root / name))
    except InputError:
        return
    raise AssertionError(f"{name} was read")

policy(str(root / "policy"))
reward(str(root / "reward"))
for weights in root.glob("*/model.safetensors"):
    weights.unlink()
refused(policy, "policy")
refused(reward, "reward")
for name in ("data.pkl", "data.jsonl", "data.parquet", "data.jsonl.gz"):
    refused(data, name)
assert not (root / "ran").exists()
assert opened == [], opened
import pickle, os
pickle.loads((root / "data.pkl").read_bytes())  # Shows that hook and payload work.
assert (root / "ran").exists() and len(opened) >= 2, opened
"""


class Payload:
    """Unpickled, it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_nothing_of_a_model_or_a_data_file_is_unpickled(
    tmp_path: Path, tiny_policy_dir: Path, tiny_reward_dir: Path
) -> None:
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    for name, source in (("policy", tiny_policy_dir), ("reward", tiny_reward_dir)):
        directory = shutil.copytree(source, tmp_path / name)
        for file in PICKLES:
            (directory / file).write_bytes(payload)
    for file in ("data.pkl", "data.jsonl", "data.parquet", "data.jsonl.gz"):
        (tmp_path / file).write_bytes(payload)
    run_python("-c", LOAD, tmp_path)


# The source

BANNED_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle", "pandas"}
BANNED_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "numpy.load", "np.load", "tempfile.mktemp",
    "OmegaConf.register_new_resolver", "hydra.utils.instantiate",
}  # fmt: skip
BANNED_KEYWORDS = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False}


def faults(source: str) -> Iterator[str]:
    """What a source file does that could run code from data."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (f"imports {name}" for name in names if name.split(".")[0] in BANNED_MODULES)
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in BANNED_CALLS:
                yield f"calls {ast.unparse(node.func)}"
            for keyword in node.keywords:
                if keyword.arg in BANNED_KEYWORDS and (
                    not isinstance(keyword.value, ast.Constant)
                    or keyword.value.value == BANNED_KEYWORDS[keyword.arg]
                ):
                    yield f"passes {keyword.arg}={ast.unparse(keyword.value)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_source_file_runs_code_from_data(path: Path) -> None:
    assert list(faults(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "eval(x)", "exec(x)", "os.system(x)", "torch.load(f)",
        "yaml.load(f)", "numpy.load(f, allow_pickle=False)", "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)", "subprocess.run(x, shell=True)", "f(weights_only=False)",
    ],
)  # fmt: skip
def test_the_lint_knows_what_it_looks_for(source: str) -> None:
    assert list(faults(source))


def test_every_pretrained_tokenizer_and_model_is_loaded_without_its_code() -> None:
    silent = [
        f"{path.name}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(".from_pretrained")
        and not ast.unparse(node.func).startswith("GenerationConfig")  # Data only: it has no such option.
        and "trust_remote_code" not in {keyword.arg for keyword in node.keywords}
    ]
    assert silent == []
