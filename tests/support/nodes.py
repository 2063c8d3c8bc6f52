"""Several machines on this one: network namespaces where the system allows them, raylets on loopback
otherwise.

A namespace node has its own network, processes, host name, /tmp/ray and /dev/shm, and addresses that exist
nowhere else. Its own name resolves to 127.0.1.1, as on a machine that Debian's installer has set up. All
nodes see the same other files. Every process carries a mark, by which it is ended with its node.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
MARK = "R2M_TEST_NODE"
START_S = 240
HOLD = """
hostname "$1"; mount --make-rprivate /
mount --bind "$2/hosts" /etc/hosts; mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p /tmp/ray; mount --bind "$2/ray" /tmp/ray
ip link set lo up; touch "$2/ready"
while true; do sleep 3600 & wait $!; done
"""


@dataclass
class Node:
    """A machine: where commands run, and with which environment."""

    name: str
    address: str
    home: Path
    mark: str
    enter: list[str] = field(default_factory=list)
    isolated: bool = False

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
        }

    def start(self, *command: str, output: Path) -> subprocess.Popen[bytes]:
        """Start a command there, in the checkout; both its streams go to a file."""
        with output.open("wb") as stream:
            return subprocess.Popen(
                [*self.enter, *command],
                env=self.environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def run(self, *command: str, timeout_s: float = START_S) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end."""
        return subprocess.run(
            [*self.enter, *command],
            env=self.environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def python(self, *arguments: str, timeout_s: float = START_S) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, *arguments, timeout_s=timeout_s)

    def kill(self) -> None:
        """End the machine: every process there, at once."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    process.kill()


@contextlib.contextmanager
def machines(count: int, state: Path) -> Iterator[list[Node]]:
    """``count`` nodes and, as the last one, a client; everything that they started ends with the block."""
    prefix = f"r2m{os.getpid()}"
    nodes: list[Node] = []
    isolated = "R2M_TEST_LOOPBACK" not in os.environ and _can_isolate(prefix)
    try:
        if isolated:
            _command("ip", "netns", "add", prefix)
            _command("ip", "-n", prefix, "link", "add", "br0", "type", "bridge")
            _command("ip", "-n", prefix, "link", "set", "br0", "up")
        token = secrets.token_hex(32)
        for i in range(count + 1):
            name = f"n{i}" if i < count else "client"
            home = state / name
            (home / ".ray").mkdir(parents=True)
            (home / ".ray" / "auth_token").touch(mode=0o600)
            (home / ".ray" / "auth_token").write_text(token)
            address = f"10.77.0.{10 + i}" if isolated else f"127.0.0.{10 + i}"
            node = Node(name, address, home, f"{prefix}-{name}", isolated=isolated)
            nodes.append(node)
            if isolated:
                _isolate(node, prefix, i)
        yield nodes
    finally:
        for node in nodes:
            node.kill()
        if isolated:
            for namespace in (prefix, *(node.mark for node in nodes)):
                subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


def start_ray(nodes: Sequence[Node], *, cpus: int) -> str:
    """Start Ray on nodes, the first one as the head; returns the address of the job server."""
    common = ["--num-cpus", str(cpus), "--object-store-memory", "200000000", "--disable-usage-stats"]
    for i, node in enumerate(nodes):
        joins = ("--address", f"{nodes[0].address}:6379")
        heads = ("--head", "--port", "6379", "--dashboard-host", "0.0.0.0")
        # Nodes on loopback share their ports.
        own = ("--node-ip-address", node.address, "--dashboard-agent-listen-port", str(52365 + i))
        done = node.python("-m", "ray.scripts.scripts", "start", *(joins if i else heads), *own, *common)
        assert done.returncode == 0, done.stdout
    return f"http://{nodes[0].address}:8265"


def _can_isolate(prefix: str) -> bool:
    """Whether this user may make network namespaces and enter new ones of every kind."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return False
    made = subprocess.run(["ip", "netns", "add", f"{prefix}x"], check=False, capture_output=True)
    subprocess.run(["ip", "netns", "del", f"{prefix}x"], check=False, capture_output=True)
    entered = subprocess.run(["unshare", "-m", "-p", "-u", "-i", "-n", "-f", "true"], check=False)
    return made.returncode == entered.returncode == 0


def _isolate(node: Node, switch: str, i: int) -> None:
    namespace = node.mark
    (node.home / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {node.name}\n")
    (node.home / "ray").mkdir()
    _command("ip", "netns", "add", namespace)
    _command(
        "ip", "-n", switch, "link", "add", f"v{i}", "type", "veth", "peer", "name", "eth0", "netns", namespace
    )
    _command("ip", "-n", switch, "link", "set", f"v{i}", "master", "br0", "up")
    _command("ip", "-n", namespace, "addr", "add", f"{node.address}/24", "dev", "eth0")
    _command("ip", "-n", namespace, "link", "set", "eth0", "up")
    kinds = ("-m", "-p", "-u", "-i")
    hold = ("unshare", *kinds, "-f", "--mount-proc", "--kill-child", "bash", "-c", HOLD, "hold")
    holder = subprocess.Popen(
        ["ip", "netns", "exec", namespace, *hold, node.name, str(node.home)],
        env=node.environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    limit = time.monotonic() + START_S
    while not (node.home / "ready").exists():
        assert holder.poll() is None, f"{node.name} did not start"
        assert time.monotonic() < limit, f"{node.name} did not start in time"
        time.sleep(0.05)
    (first,) = psutil.Process(holder.pid).children()
    node.enter = ["nsenter", "-t", str(first.pid), *kinds, "-n", f"--wd={ROOT}"]


def _command(*words: str) -> None:
    subprocess.run(words, check=True)
