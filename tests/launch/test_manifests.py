"""The Kubernetes and SkyPilot files: known fields alone, and a command of ours that composes.

The fields are those that the files may use, from KubeRay's API reference (ray.io/v1, KubeRay 1.6),
Kubernetes' core/v1 and SkyPilot's YAML reference. A name that is not listed is a mistake, or an addition to
be looked up there first.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import Config
from r2m_ray.runtime.demand import demands, shortage

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

TEXT, COUNT, SWITCH, MAP = str, int, bool, dict
VOLUME = {
    "name": TEXT,
    "persistentVolumeClaim": {"claimName": TEXT},
    "emptyDir": {"medium": TEXT, "sizeLimit": TEXT},
}
CONTAINER = {
    "name": TEXT,
    "image": TEXT,
    "resources": {"requests": MAP, "limits": MAP},
    "volumeMounts": [{"name": TEXT, "mountPath": TEXT}],
}
POD = {"spec": {"securityContext": {"fsGroup": COUNT}, "containers": [CONTAINER], "volumes": [VOLUME]}}
RAY_JOB: dict[str, Any] = {
    "apiVersion": TEXT,
    "kind": TEXT,
    "metadata": {"name": TEXT},
    "spec": {
        "entrypoint": TEXT,
        "runtimeEnvYAML": TEXT,
        "submissionMode": TEXT,
        "backoffLimit": COUNT,
        "shutdownAfterJobFinishes": SWITCH,
        "ttlSecondsAfterFinished": COUNT,
        "rayClusterSpec": {
            "rayVersion": TEXT,
            "authOptions": {"mode": TEXT},
            "headGroupSpec": {"rayStartParams": MAP, "template": POD},
            "workerGroupSpecs": [
                {
                    "groupName": TEXT,
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": MAP,
                    "template": POD,
                }
            ],
        },
    },
}
SKYPILOT: dict[str, Any] = {
    "name": TEXT,
    "workdir": TEXT,
    "num_nodes": COUNT,
    "resources": {"infra": TEXT, "accelerators": TEXT, "disk_size": COUNT},
    "secrets": MAP,
    "volumes": MAP,
    "setup": TEXT,
    "run": TEXT,
}


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((LAUNCH / name).read_text())
    return found


def unknown(value: Any, schema: Any, path: str = "") -> list[str]:
    """Fields that the schema does not name, or that have another type."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [path]
        extra = [f"{path}.{name}" for name in value if name not in schema]
        known = [unknown(v, schema[n], f"{path}.{n}") for n, v in value.items() if n in schema]
        return [*extra, *(fault for faults in known for fault in faults)]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [path]
        return [f for i, item in enumerate(value) for f in unknown(item, schema[0], f"{path}[{i}]")]
    return [] if type(value) is schema else [path]


def trained(command: str) -> Config:
    """The configuration of the `r2m-ray train` in a shell command."""
    words = shlex.split(command)
    if words[0] == "sh":
        words = shlex.split(words[2].replace("&&", ";"))
    overrides = words[words.index("train") + 1 :]
    # Shell variables stand for what is known on the cluster.
    return load_config([re.sub(r"\$\w+", "head", word) for word in overrides])


@pytest.mark.parametrize(
    ("name", "schema"),
    [("rayjob_cpu.yaml", RAY_JOB), ("rayjob_gpu.yaml", RAY_JOB), ("skypilot.yaml", SKYPILOT)],
)
def test_a_manifest_has_known_fields_of_the_right_types(name: str, schema: dict[str, Any]) -> None:
    assert unknown(read(name), schema) == []


def test_a_misspelt_field_or_a_wrong_type_is_found() -> None:
    job = read("rayjob_cpu.yaml")
    job["spec"]["entryPoint"] = job["spec"].pop("entrypoint")
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = "1"
    assert unknown(job, RAY_JOB) == [".spec.entryPoint", ".spec.rayClusterSpec.workerGroupSpecs[0].replicas"]


@pytest.mark.parametrize("name", ["rayjob_cpu.yaml", "rayjob_gpu.yaml"])
def test_a_ray_job_runs_what_its_cluster_can_hold(name: str) -> None:
    job = read(name)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    config = trained(spec["entrypoint"])
    assert config.cluster.address == "auto"
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    cluster = spec["rayClusterSpec"]
    nodes = [
        (group.get("replicas", 1), group["template"]["spec"]["containers"][0], group["rayStartParams"])
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    offers = [
        {
            "CPU": float(start.get("num-cpus", container["resources"]["limits"]["cpu"])),
            "GPU": float(container["resources"]["limits"].get("nvidia.com/gpu", 0)),
        }
        for count, container, start in nodes
        for _ in range(count)
    ]
    assert shortage(demands(config), offers, config.cluster.placement) is None
    user = re.search(r"useradd .*--uid (\d+)", (LAUNCH.parent / "Dockerfile").read_text())
    assert user is not None
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["securityContext"]["fsGroup"] == int(user[1])
    for _, container, _ in nodes:
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"/work", "/dev/shm"}
    assert config.run.root.startswith("/work/")
    wait = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert int(wait) >= config.cluster.stop_grace_s + 60


def test_skypilot_trains_on_all_its_gpus() -> None:
    task = read("skypilot.yaml")
    lines = task["run"].splitlines()
    config = trained(next(line.strip() for line in lines if "r2m-ray train" in line))
    assert config.run.root.startswith(next(iter(task["volumes"])))
    _, gpus = task["resources"]["accelerators"].split(":")
    offers = task["num_nodes"] * [{"CPU": 64.0, "GPU": float(gpus)}]
    assert shortage(demands(config), offers, config.cluster.placement) is None
    assert "export RAY_AUTH_MODE=token" in task["run"]
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None}
