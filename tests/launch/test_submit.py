"""The submission wrapper: what is uploaded, what is merged, and what is refused before anything leaves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from r2m_ray.errors import InputError

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "submit.py"


@pytest.fixture(scope="module")
def submit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("submit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working tree of 3 MiB, of which 1 MiB is code and configuration."""
    for name in (
        "r2m_ray/a.py",
        "conf/b.yaml",
        "runs/demo/model.safetensors",
        "pairs.jsonl",
        ".git/objects/x",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(2**19))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "large.bin").write_bytes(bytes(2**19))
    return tmp_path


def test_only_code_and_configuration_are_uploaded(submit: ModuleType, tree: Path) -> None:
    def names(*excludes: str) -> set[str]:
        files = submit.uploaded(tree, [*submit.EXCLUDES, *excludes])
        return {path.relative_to(tree).as_posix() for path in files}

    assert names() == {"r2m_ray/a.py", "conf/b.yaml", "notes/large.bin"}
    assert names("notes/") == {"r2m_ray/a.py", "conf/b.yaml"}
    assert names("/notes/*.bin") == {"r2m_ray/a.py", "conf/b.yaml"}


def test_a_large_upload_is_refused_by_its_largest_files(submit: ModuleType, tree: Path) -> None:
    submit.check_size(tree, submit.EXCLUDES, 1.5)
    with pytest.raises(InputError) as caught:
        submit.check_size(tree, submit.EXCLUDES, 1.4)
    text = str(caught.value)
    assert "1.5 MiB to upload, the limit is 1.4" in text
    assert "notes/large.bin" in text
    assert "--max-mib" in text
    with pytest.raises(InputError, match="no local directory"):
        submit.check_size(tree / "none", submit.EXCLUDES, 1)


def test_published_results_stay_at_home(submit: ModuleType) -> None:
    """They grow with every study, and would one day be over the limit of an upload that needs none."""
    paths = submit.uploaded(submit.ROOT, submit.EXCLUDES)
    files = {path.relative_to(submit.ROOT).parts[:2] for path in paths}
    assert ("benchmarks", "results") not in files
    assert {("r2m_ray", "driver"), ("conf", "experiment"), ("benchmarks", "overoptimization")} <= files


def test_a_runtime_env_is_merged_and_wins(submit: ModuleType) -> None:
    own = {"env_vars": {"NCCL_DEBUG": "INFO"}, "excludes": ["notes", "runs"], "pip": ["einops"]}
    merged = submit.merged(own)
    assert merged["env_vars"] == own["env_vars"]
    assert merged["pip"] == ["einops"]
    assert merged["excludes"] == [*submit.EXCLUDES, "notes"]
    assert merged["working_dir"] == str(SCRIPT.parents[1])
    assert submit.merged({"working_dir": "/elsewhere"})["working_dir"] == "/elsewhere"


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "DB_PASSWORD", "my_secret"])
def test_secrets_do_not_travel(submit: ModuleType, name: str) -> None:
    submit.refuse_secrets(
        {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}, ["train", "task.max_new_tokens=8"]
    )
    with pytest.raises(InputError, match=name) as caught:
        submit.refuse_secrets({"env_vars": {name: "hunter2"}}, ["train"])
    assert "hunter2" not in str(caught.value)


def test_the_submission_is_shown_and_joins_its_cluster(
    submit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "env.yaml").write_text("env_vars: {NCCL_DEBUG: INFO}\n")
    options = ["--dry-run", "--address", "http://head:8265", "--runtime-env", str(tmp_path / "env.yaml")]
    assert submit.main([*options, "--", "train", "experiment=demo"]) == 0
    command = json.loads(capsys.readouterr().out)
    assert command[:5] == ["ray", "job", "submit", "--address", "http://head:8265"]
    assert command[5] == "--runtime-env-json"
    assert json.loads(command[6])["env_vars"] == {"NCCL_DEBUG": "INFO"}
    assert command[7:] == [
        "--",
        "python",
        "-m",
        "r2m_ray",
        "train",
        "experiment=demo",
        "cluster.address=auto",
    ]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "experiment=dmo"], "Did you mean demo?"),
        (["train", "--multirun", "reward=vanilla,r2n"], "Did you mean r2m?"),
        (["prepare", "algo.stepz=1"], "Did you mean algo.steps?"),
    ],
)
def test_a_wrong_configuration_is_refused_here(
    submit: ModuleType, command: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main(["--dry-run", "--", *command]) == 2
    assert words in capsys.readouterr().err


def test_a_runtime_env_that_is_no_mapping_is_refused(
    submit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "env.yaml").write_text("- a\n")
    for name in ("env.yaml", "none.yaml"):
        assert submit.main(["--dry-run", "--runtime-env", str(tmp_path / name), "--", "train"]) == 2
        assert "not a runtime_env" in capsys.readouterr().err
