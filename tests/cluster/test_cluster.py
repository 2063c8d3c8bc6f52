"""Three nodes on this machine: submit, refuse, stop and resume, spread out, lose a node, lose the head."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nodes import Node, machines, start_ray

from r2m_ray.config.compose import load_config
from r2m_ray.run.vocabulary import MACHINE_PREFIXES
from r2m_ray.tasks.prepare.store import prepare

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

SMALL = (
    "experiment=demo",
    "logging=disabled",
    "prepare.sft_rows=512",
    "prepare.sft_steps=6",
    "prepare.pair_rows=128",
    "prepare.reward_steps=4",
    "algo.steps=4",
    "algo.prompts_per_step=4",
    "algo.prompts_per_shard=1",
    "algo.responses_per_prompt=4",
    "algo.minibatch_prompts=2",
    "task.max_new_tokens=16",
    "evaluate.every=2",
    "evaluate.prompts=4",
    "evaluate.pairs=4",
    "checkpoint.every=1",
    "checkpoint.keep=4",
    "cluster.cpus=4",
    "cluster.object_store_gb=0.2",
    "cluster.start_timeout_s=240",
    "cluster.phase_timeout_s=120",
    "cluster.stop_grace_s=60",
)
WIDE = (
    *("policy.ranks=2", "rollout.replicas=2", "reward.replicas=2", "reference.replicas=2"),
    *("cluster.cpus_per_actor=0.5", "algo.steps=6"),
)
SPREAD = "cluster.placement=SPREAD"
RUN_S = 900.0


@dataclass
class Lab:
    """The cluster, and the shared directory that every node sees."""

    nodes: list[Node]
    client: Node
    server: str
    shared: Path

    @property
    def places(self) -> list[str]:
        return [f"run.root={self.shared / 'runs'}", f"prepare.root={self.shared / 'prepared'}"]

    def submission(self, name: str, *overrides: str) -> list[str]:
        command = ["train", *SMALL, *self.places, f"run.name={name}", *overrides]
        script = [sys.executable, "launch/submit.py", "--python", sys.executable]
        return [*script, "--address", self.server, "--", *command]

    def submit(self, name: str, *overrides: str) -> tuple[int, str]:
        done = self.client.run(*self.submission(name, *overrides), timeout_s=RUN_S)
        return done.returncode, done.stdout

    def start(self, name: str, *overrides: str) -> tuple[subprocess.Popen[bytes], Path]:
        output = self.shared / f"{name}.txt"
        return self.client.start(*self.submission(name, *overrides), output=output), output

    def local(self, node: Node, name: str, *overrides: str) -> tuple[int, str]:
        """A run on a cluster of its own on one node."""
        command = ["-m", "r2m_ray", "train", *SMALL, *self.places, f"run.name={name}", *overrides]
        done = node.python(*command, timeout_s=RUN_S)
        return done.returncode, done.stdout

    def directory(self, name: str) -> Path:
        return self.shared / "runs" / name

    def steps(self, name: str) -> int:
        file = self.directory(name) / "metrics.jsonl"
        return file.read_text().count('"kind": "step"') if file.exists() else 0

    def result(self, name: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """All metrics but the machine's, and sha256 of each tensor file of the last checkpoint."""
        directory = self.directory(name)
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        own = [{k: v for k, v in row.items() if not k.startswith(MACHINE_PREFIXES)} for row in rows]
        newest = sorted((directory / "checkpoints").glob("step-*"))[-1]
        files = sorted(newest.rglob("*.safetensors"))
        assert files
        return own, {str(f.relative_to(newest)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def wait_until(condition: Callable[[], object], process: subprocess.Popen[bytes], output: Path) -> None:
    limit = time.monotonic() + RUN_S
    while not condition():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < limit, output.read_text()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    # Sockets need short paths.
    with tempfile.TemporaryDirectory(prefix="r2m-c", dir="/tmp") as folder:
        shared = Path(folder)
        prepare(load_config([*SMALL, f"prepare.root={shared / 'prepared'}"]))
        with machines(3, shared) as (*nodes, client):
            kind = "network namespaces" if client.isolated else "raylets on loopback"
            print(f"\nthree nodes and a client: {kind}")
            yield Lab(nodes, client, start_ray(nodes, cpus=3), shared)


def test_a_submitted_run_lies_where_it_was_asked_for(lab: Lab) -> None:
    code, text = lab.submit("plain", SPREAD)
    assert code == 0, text
    assert (lab.directory("plain") / "report" / "report.html").is_file()
    assert lab.steps("plain") == 4


def test_a_wrong_configuration_or_input_is_two(lab: Lab) -> None:
    code, text = lab.submit("wrong", "algo.stepz=1")
    assert (code, "Did you mean algo.steps?" in text) == (2, True), text
    # This one only the cluster can know.
    code, text = lab.submit("plain")
    assert (code, "holds a run" in text) == (2, True), text


def test_a_stopped_job_is_saved_and_resumed_to_the_bit(lab: Lab) -> None:
    process, output = lab.start("stopped", SPREAD)
    wait_until(lambda: lab.steps("stopped") >= 2, process, output)
    job = re.search(r"submitted as (\S+);", output.read_text())
    assert job is not None
    stop = lab.client.python("-m", "ray.scripts.scripts", "job", "stop", "--address", lab.server, job[1])
    assert stop.returncode == 0, stop.stdout
    assert process.wait(RUN_S) == 75, output.read_text()
    assert lab.steps("stopped") < 4
    code, text = lab.submit("stopped", SPREAD, "run.resume=true")
    assert code == 0, text
    assert lab.result("stopped") == lab.result("plain")


@pytest.fixture(scope="module")
def one_node(lab: Lab) -> str:
    """A run with several ranks and replicas on one node, which those on three must equal."""
    code, text = lab.local(lab.client, "wide", *WIDE)
    assert code == 0, text
    return "wide"


def test_three_nodes_equal_one_to_the_bit(lab: Lab, one_node: str) -> None:
    code, text = lab.submit("spread", *WIDE, SPREAD)
    assert code == 0, text
    assert lab.result("spread") == lab.result(one_node)


def test_a_node_lost_in_a_step_is_one_recovery_for_each_actor(lab: Lab, one_node: str) -> None:
    process, output = lab.start("struck", *WIDE, SPREAD)
    wait_until(lambda: lab.steps("struck") >= 1, process, output)
    lab.nodes[2].kill()
    assert process.wait(RUN_S) == 0, output.read_text()
    assert lab.result("struck") == lab.result(one_node)
    replaced = re.findall(r"(\S+-\d+(?:, \S+-\d+)*) replaced after", output.read_text())
    names = [name for line in replaced for name in line.split(", ")]
    assert names, output.read_text()
    assert len(names) == len(set(names)), names


def test_the_loss_of_the_head_ends_a_run_on_another_node_with_three(lab: Lab) -> None:
    """The last test: it ends the cluster."""
    command = ["train", *SMALL, *lab.places, "run.name=orphan", "algo.steps=400"]
    joined = ["cluster.address=auto", "cluster.cpus_per_actor=0.1"]
    output = lab.shared / "orphan.txt"
    process = lab.nodes[1].start(sys.executable, "-m", "r2m_ray", *command, *joined, output=output)
    wait_until(lambda: lab.steps("orphan") >= 1, process, output)
    lab.nodes[0].kill()
    start = time.monotonic()
    assert process.wait(120) == 3, output.read_text()
    assert time.monotonic() - start < 60
    text = output.read_text()
    assert "the head of the Ray cluster" in text
    assert "run.resume=true" in text
