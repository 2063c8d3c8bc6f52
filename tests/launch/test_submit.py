"""The submission wrapper: what is uploaded, what is merged, and what is refused before anything leaves."""

from __future__ import annotations

import json
import shlex
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import pytest
from ray.job_submission import JobDetails
from scripts import load_script

from r2m_ray.errors import InputError

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "submit.py"
ROOTS = ("run.root=/shared/runs", "prepare.root=/shared/prepared")


@pytest.fixture(scope="module")
def submit() -> ModuleType:
    return load_script(SCRIPT)


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
    merged = submit.merged(own, 240)
    assert merged["env_vars"] == {"NCCL_DEBUG": "INFO", "RAY_JOB_STOP_WAIT_TIME_S": "300"}
    assert merged["pip"] == ["einops"]
    assert merged["excludes"] == [*submit.EXCLUDES, "notes"]
    assert merged["working_dir"] == str(SCRIPT.parents[1])
    assert submit.merged({"working_dir": "/elsewhere"}, 240)["working_dir"] == "/elsewhere"


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
    command = ["train", "experiment=demo", *ROOTS, "cluster.stop_grace_s=100"]
    assert submit.main([*options, "--python", "/env/python", "--", *command]) == 0
    submission = json.loads(capsys.readouterr().out)
    assert submission["runtime_env"]["env_vars"] == {"NCCL_DEBUG": "INFO", "RAY_JOB_STOP_WAIT_TIME_S": "160"}
    words = shlex.split(submission["entrypoint"])
    assert words == ["/env/python", "-m", "r2m_ray", *command, "cluster.address=auto"]


def test_what_is_right_on_the_cluster_is_not_refused_for_this_machine(submit: ModuleType) -> None:
    many = ["train", "experiment=demo", *ROOTS, "rollout.replicas=4", "cluster.cpus_per_actor=2"]
    assert submit.main(["--dry-run", "--", *many]) == 0
    assert submit.main(["--dry-run", "--", *many, "cluster.address=local"]) == 2


def test_a_search_is_checked_by_what_it_starts_from(submit: ModuleType) -> None:
    roots = ["run.root=/s", "prepare.root=/p", "cluster.address=auto"]
    search = ["hydra/sweeper=optuna", "policy.learning_rate=interval(1e-5,1e-3)"]
    (config,) = submit.checked(["train", "-m", "experiment=demo", *roots, *search])
    assert config.run.root == "/s"
    with pytest.raises(InputError, match=r"run\.root"):
        submit.checked(["train", "-m", "experiment=demo", "prepare.root=/p", *search])


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        (["train", "experiment=demo"], ["run.root", "prepare.root"]),
        (["train", "experiment=demo", "run.root=/shared/runs"], ["prepare.root"]),
        (["prepare", "experiment=demo"], ["prepare.root"]),
        (["train", "experiment=dialogue_llama3_8b", "run.root=/shared/runs"], []),
        (
            [
                "train",
                "experiment=dialogue_llama3_8b",
                "run.root=/r",
                "task.train_file=a.jsonl",
                "model.policy=./m",
            ],
            ["task.train_file", "model.policy"],
        ),
        (["train", "-m", "experiment=demo", "prepare.root=/p", "run.seed=1,2"], ["run.root"]),
        (["evaluate", "runs/demo", "evaluate.prompts=8"], ["runs/demo"]),
        (["evaluate", "/shared/runs/demo", "evaluate.prompts=8"], []),
    ],
)
def test_paths_that_only_this_machine_knows_are_refused_before_the_upload(
    submit: ModuleType, command: list[str], fields: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main(["--dry-run", "--", *command]) == (2 if fields else 0)
    lines = capsys.readouterr().err.splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == fields
    assert all("absolute path" in line for line in lines)


def details(status: str, code: int | None = None) -> JobDetails:
    return JobDetails(type="SUBMISSION", entrypoint="x", status=status, driver_exit_code=code)


@pytest.mark.parametrize(
    ("status", "driver", "expected"),
    [("SUCCEEDED", 0, 0), ("STOPPED", None, 75), ("FAILED", None, 3), ("FAILED", -9, 3)]
    + [("FAILED", code, code) for code in (2, 3, 4, 75, 127)],
)
def test_the_exit_code_is_the_runs(
    submit: ModuleType, status: str, driver: int | None, expected: int
) -> None:
    assert submit.exit_code(details(status, driver)) == expected


class Client:
    """A job server's client whose server is an open port, or none."""

    def __init__(self, port: int, answers: list[JobDetails]) -> None:
        self.port, self.answers = port, answers

    def get_address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get_job_info(self, job: str) -> JobDetails:
        return self.answers.pop(0)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "step 1/2\n"


def test_a_job_is_followed_to_its_end(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "POLL_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = Client(
            server.getsockname()[1], [details("PENDING"), details("RUNNING"), details("FAILED", 4)]
        )
        assert submit.followed(client, "raysubmit_1") == 4
    assert "step 1/2" in capsys.readouterr().out


def test_a_head_that_is_gone_ends_the_wait(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "POLL_S", 0.05)
    monkeypatch.setattr(submit, "HEAD_SILENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert submit.followed(Client(port, []), "raysubmit_1") == 3
    printed = capsys.readouterr().err
    assert f"the head of the cluster (http://127.0.0.1:{port}) was gone" in printed
    assert "run.resume=true" in printed


def test_a_server_that_does_not_answer_is_a_mistake_in_the_address(
    submit: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = ["train", "experiment=demo", *ROOTS]
    assert submit.main(["--address", f"http://127.0.0.1:{port}", "--", *command]) == 2
    assert "--address" in capsys.readouterr().err


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
        assert submit.main(["--dry-run", "--runtime-env", str(tmp_path / name), "--", "plan"]) == 2
        assert "not a runtime_env" in capsys.readouterr().err
