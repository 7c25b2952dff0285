"""The files under cluster/ are valid, agree with the pinned versions, and hold the runs they are made for.

None of them is run here: there is no Kubernetes, cloud or Slurm. Ray's own readers of them are used where there are any.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args
from typer.main import get_command

from taid_ray.cli.app import app
from taid_ray.config.schema import DistillConfig, load_config
from taid_ray.distributed.capacity import STUDENT_RESOURCE, TEACHER_RESOURCE, Demand, check_capacity, check_object_store
from taid_ray.errors import ClusterError
from taid_ray.teacher.payload import bytes_per_token
from tests.support.cluster_schema import complaints
from tests.support.kustomize import build, documents
from tests.support.paths import ROOT

FILES = ROOT / "cluster"
KUBERAY = FILES / "kuberay"
BUILT = sorted(path.parent for path in KUBERAY.glob("*/*/kustomization.yaml") if path.parts[-3] != "components")
CLUSTERS = [path for path in BUILT if path.parent.name == "clusters"]
JOBS = [path for path in BUILT if path.parent.name == "jobs"]
IN_IMAGE = "/opt/taid-ray/"
HIDDEN_SIZES = {
    "Qwen/Qwen2.5-32B-Instruct": 5120, "microsoft/Phi-3-mini-4k-instruct": 3072, "taid_ray/quickstart/stories260k": 64,
}  # fmt: skip
"""What a teacher sends per token, in numbers."""

KUSTOMIZE = next(
    (words for words in (["kustomize", "build"], ["kubectl", "kustomize"]) if shutil.which(words[0])), None
)
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
needs_kustomize = pytest.mark.skipif(KUSTOMIZE is None, reason="neither kustomize nor kubectl is installed")


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def pinned(package: str) -> str:
    [version] = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return str(version)


def kustomized(directory: Path) -> list[dict[str, Any]]:
    assert KUSTOMIZE is not None
    done = subprocess.run([*KUSTOMIZE, str(directory)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return sorted(yaml.safe_load_all(done.stdout), key=lambda found: found["kind"])


def cluster_spec(objects: list[dict[str, Any]]) -> dict[str, Any]:
    [found] = objects
    return found["spec"]["rayClusterSpec"] if found["kind"] == "RayJob" else found["spec"]


def config_of(command: str, overrides: tuple[str, ...] = ()) -> DistillConfig:
    """The configuration a command line would train with. Fails where the command line itself is wrong."""
    words = shlex.split(command)
    assert words[0] == "taid-ray"
    context = get_command(app).commands[words[1]].make_context(words[1], words[2:])
    assert context.params["out"].startswith("/mnt/taid/runs/")
    name = str(context.params.get("config", IN_IMAGE + "taid_ray/configs/quickstart.yaml"))
    assert name.startswith(IN_IMAGE)
    path = ROOT / name.removeprefix(IN_IMAGE)
    config = load_config(path, [*(context.params["overrides"] or []), f"out={context.params['out']}", *overrides])
    assert config.data_store == "/mnt/taid/runs/encoded-data"  # on the volume that all nodes see
    return config


def check_fits(config: DistillConfig, kinds: list[tuple[int, dict[str, float]]]) -> None:
    """Raises ClusterError unless the run fits on a cluster of so many nodes of each kind, as a run itself would."""
    nodes = [{"Alive": True, "Resources": kind} for count, kind in kinds for _ in range(count)]
    total = {
        key: sum(node["Resources"].get(key, 0) for node in nodes) for key in ("GPU", STUDENT_RESOURCE, TEACHER_RESOURCE)
    }
    demand = Demand(
        device="cuda" if total["GPU"] else "cpu",
        workers=config.student.workers.min,
        max_workers=config.student.workers.max,
        worker_cpus=config.student.cpus_per_worker,
        replicas=config.teacher.replicas.min,
        max_replicas=config.teacher.replicas.max,
        shards=config.teacher.shards,
        shard_cpus=config.teacher.cpus_per_shard,
        student_role=total[STUDENT_RESOURCE] > 0,
        teacher_role=total[TEACHER_RESOURCE] > 0,
    )
    assert demand.student_role and demand.teacher_role
    check_capacity(demand, nodes)
    if any("object_store_memory" in node["Resources"] for node in nodes):
        per_token = bytes_per_token(config.teacher.payload, HIDDEN_SIZES[str(config.teacher.model)], 0, 0, 4)
        answer = per_token * config.train.micro_batch_size * config.data.sequence_length
        check_object_store(answer, config.teacher, demand.max_workers, nodes)


def in_bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMGT]i)?", quantity).groups()
    return int(number) * 2 ** (10 * (" KMGT".index(unit[0]) if unit else 0))


# KubeRay


@needs_kustomize
@pytest.mark.parametrize("directory", BUILT, ids=named)
def test_kustomize_builds_what_the_other_tests_look_at(directory: Path) -> None:
    assert kustomized(directory) == build(directory)


def groups(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "head", spec["headGroupSpec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group


@pytest.mark.parametrize("directory", CLUSTERS + JOBS, ids=named)
def test_a_cluster_has_a_head_a_teacher_and_a_student(directory: Path) -> None:
    [found] = objects = build(directory)
    spec = cluster_spec(objects)
    assert found["apiVersion"] == "ray.io/v1"
    assert found["kind"] == ("RayJob" if directory in JOBS else "RayCluster")
    assert spec["rayVersion"] == pinned("ray")
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token"}
    assert [name for name, _ in groups(spec)] == ["head", "teacher", "student"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for role, group in list(groups(spec))[1:]:
        gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", "1")
        assert group["resources"] == {f"taid_{role}": gpus}
        assert group["labels"] == {"taid/role": role}
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        # KubeRay refuses these beside `resources`
        assert not group["rayStartParams"].keys() & {"num-cpus", "num-gpus", "memory", "resources", "labels"}


@pytest.mark.parametrize("directory", CLUSTERS + JOBS, ids=named)
def test_every_pod_has_shared_memory_the_runs_and_the_image(directory: Path) -> None:
    spec = cluster_spec(build(directory))
    [claim] = build(KUBERAY / "storage" / "shared")
    images = set()
    for role, group in groups(spec):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert group["template"]["metadata"]["labels"] == {"taid/role": role}
        assert "restartPolicy" not in pod  # autoscaler v2 accepts no other than its own
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert mounts["/mnt/taid"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert mounts["/etc/taid"]["configMap"]["optional"] is True
        limits, shared = container["resources"]["limits"], in_bytes(mounts["/dev/shm"]["emptyDir"]["sizeLimit"])
        assert int(group["rayStartParams"]["object-store-memory"]) <= 0.8 * shared
        assert shared <= in_bytes(limits["memory"]) / 4
        assert ("tolerations" in pod) == ("nvidia.com/gpu" in limits)
        images.add(container["image"])
    assert images == {"taid-ray:cpu" if "cpu" in directory.name else "taid-ray:gpu"}


def rays_view(spec: dict[str, Any]) -> list[tuple[int, dict[str, float]]]:
    """Numbers and resources of nodes, as Ray's own autoscaler reads them from the manifest."""
    types = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "any", "namespace": "any"}, "spec": spec})[
        "available_node_types"
    ]
    stores = {role: int(group["rayStartParams"]["object-store-memory"]) for role, group in groups(spec)}
    return [
        (found["min_workers"], found["resources"] | {"object_store_memory": stores[role]})
        for role, found in types.items()
        if role in stores
    ] + [(1, types["headgroup"]["resources"])]


@pytest.mark.parametrize("directory", JOBS, ids=named)
def test_the_run_of_a_job_fits_its_cluster_exactly(directory: Path) -> None:
    [job] = build(directory)
    config, kinds = config_of(job["spec"]["entrypoint"]), rays_view(job["spec"]["rayClusterSpec"])
    check_fits(config, kinds)
    for smaller in range(2):
        fewer = [(count - (place == smaller), resources) for place, (count, resources) in enumerate(kinds)]
        with pytest.raises((ClusterError, AssertionError)):
            check_fits(config, fewer)
    assert job["spec"]["shutdownAfterJobFinishes"] is True and job["spec"]["backoffLimit"] > 0


def test_gang_scheduling_changes_one_label_only() -> None:
    [job], [gang] = build(KUBERAY / "jobs/tinyswallow"), build(KUBERAY / "jobs/tinyswallow-gang")
    assert gang["metadata"].pop("labels") == {"ray.io/gang-scheduling-enabled": "true"}
    assert job["metadata"].pop("labels") == {}
    assert gang == job


def test_a_size_says_nothing_that_the_base_says() -> None:
    [base] = documents(KUBERAY / "base/raycluster.yaml")
    for size in KUBERAY.glob("clusters/*/size.yaml"):
        for operation in documents(size)[0]:
            place: Any = base
            for part in operation["path"].split("/")[1:]:
                place = place[int(part) if isinstance(place, list) else part]
            assert place != operation["value"], f"{size}: {operation['path']} is so already"


def test_the_volume_is_the_same_claim_on_one_node() -> None:
    [shared], [one_node] = build(KUBERAY / "storage/shared"), build(KUBERAY / "storage/one-node")
    assert shared["metadata"] == one_node["metadata"]
    assert [claim["spec"]["accessModes"] for claim in (shared, one_node)] == [["ReadWriteMany"], ["ReadWriteOnce"]]


@needs_kustomize
def test_a_run_of_ones_own_finds_its_configuration(tmp_path: Path) -> None:
    config, job = kustomized(KUBERAY / "own")
    assert {
        volume["configMap"]["name"]
        for _, group in groups(job["spec"]["rayClusterSpec"])
        for volume in group["template"]["spec"]["volumes"]
        if "configMap" in volume
    } == {config["metadata"]["name"]}
    assert shlex.split(job["spec"]["entrypoint"])[2] == "/etc/taid/" + next(iter(config["data"]))
    (tmp_path / "config.yaml").write_text(config["data"]["config.yaml"])
    check_fits(load_config(tmp_path / "config.yaml"), rays_view(job["spec"]["rayClusterSpec"]))
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"].endswith(
        "/taid-ray:gpu"
    )


@pytest.mark.skipif(
    "KUBERAY_CRD_DIR" not in os.environ, reason="KUBERAY_CRD_DIR names no directory with KubeRay's definitions"
)
@pytest.mark.parametrize("directory", CLUSTERS + JOBS, ids=named)
def test_kuberays_own_definitions_accept_it(directory: Path) -> None:
    definitions = Path(os.environ["KUBERAY_CRD_DIR"])
    [found] = objects = build(directory)
    assert complaints(found, definitions) == []
    spec = cluster_spec(objects)
    spec["autoscalerOptions"]["version"] = "v3"
    spec["workerGroupSpecs"][0]["minReplica"] = 1
    del spec["workerGroupSpecs"][1]["template"]
    assert len(complaints(found, definitions)) == 3


# ray up


@pytest.mark.parametrize("name, overrides", [("aws", ("teacher.replicas=4", "student.workers=8")), ("gcp", ())])
def test_ray_up_accepts_the_file_and_the_run_fits(name: str, overrides: tuple[str, ...]) -> None:
    config = prepare_config(yaml.safe_load((FILES / f"{name}.yaml").read_text()))
    validate_config(config)
    types = config["available_node_types"]
    assert types.keys() == {"head", "teacher", "student"} and config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}
    for role in ("teacher", "student"):
        assert types[role]["resources"][f"taid_{role}"] == types[role]["resources"]["GPU"]
        assert types[role]["labels"] == {"taid/role": role}
    assert config["setup_commands"] == []  # Ray's own default would install another Ray
    command = f"taid-ray train {IN_IMAGE}taid_ray/configs/tinyswallow.yaml --out /mnt/taid/runs/tinyswallow"
    check_fits(
        config_of(command, overrides), [(found.get("min_workers", 0), found["resources"]) for found in types.values()]
    )
    assert " ".join([command, *overrides]) in " ".join((ROOT / "docs/launch-ray-up.md").read_text().split())


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_ray_up_refuses_a_key_it_does_not_know(name: str) -> None:
    config = prepare_config(yaml.safe_load((FILES / f"{name}.yaml").read_text()))
    config["available_node_types"]["teacher"]["max_worker"] = 1
    with pytest.raises(Exception, match="max_worker"):
        validate_config(config)


# Docker


def test_the_image_has_the_pinned_versions() -> None:
    lines = (FILES / "Dockerfile").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"ARG RAY_VERSION={pinned('ray')}" in lines
    [base] = [line for line in lines if line.startswith("FROM ")]
    assert base == "FROM rayproject/ray:${RAY_VERSION}-py311-${DEVICE}"
    assert project["requires-python"] == ">=3.11"
    assert "Python 3.11" in (ROOT / "constraints.txt").read_text().splitlines()[0]
    for line in lines:
        if "pip install" in line:
            assert "-c constraints.txt" in line
    [extras] = re.findall(r"\.\[(.*)\]", "\n".join(lines))
    assert set(extras.split(",")) < project["optional-dependencies"].keys()


def test_the_image_gets_what_it_copies() -> None:
    lines = (FILES / "Dockerfile").read_text().splitlines()
    sent = (FILES / "Dockerfile.dockerignore").read_text().splitlines()
    for name in [name for line in lines if line.startswith("COPY") for name in line.split()[2:-1]]:
        assert (ROOT / name).exists() and f"!{name}" in sent


# Slurm

SCRIPTS = sorted((FILES / "slurm").iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_the_script(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(
        [str(SHELLCHECK), "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


STUBS = {
    "hostname": 'echo "10.0.0.1 172.17.0.1 "',
    "scontrol": 'tr , "\\n" <<<"$3"',  # show hostnames LIST
    # Runs its command once a node, as if on that node, and with what Slurm would say there.
    "srun": """
        group=SLURM_JOB_NODELIST_HET_GROUP_
        while [[ $1 == --* ]]; do [[ $1 == --het-group=* ]] && group+=${1#*=}; shift; done
        IFS=, read -ra names <<<"${!group:-$SLURM_JOB_NODELIST}"
        for id in "${!names[@]}"; do SLURM_NODEID=$id SLURM_GPUS_ON_NODE=4 SLURM_CPUS_ON_NODE=32 "$@" || exit; done""",
    "ray": """
        if [[ $1 == get-auth-token ]]; then [[ $RAY_AUTH_MODE == token ]]; exit; fi
        printf -v call '%s\\n' "$@"
        # Written at once, because both roles of a job start at the same time; printf itself would write line by line.
        cat >>"$CALLS" <<<"$call----"
        if [[ $* == *fails* ]]; then exit 7; fi""",
}


@pytest.fixture
def submitted(tmp_path: Path) -> dict[str, str]:
    """Environment of a batch script submitted where programs of Slurm and Ray only write down how they were called."""
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name, body in STUBS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "cluster").symlink_to(FILES)
    return {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path), "CALLS": str(tmp_path / "calls")}


def batch(environment: dict[str, str], script: str, *command: str) -> int:
    # A copy, as Slurm runs one: the script cannot look beside itself.
    copy = Path(environment["SLURM_SUBMIT_DIR"]) / "slurm_script"
    copy.write_text((FILES / "slurm" / script).read_text())
    return subprocess.run(["bash", str(copy), *command], env=environment, capture_output=True, timeout=60).returncode


def started_nodes(environment: dict[str, str], command: list[str], count: int) -> list[dict[str, float]]:
    """Resources of the nodes that Ray was asked to start, each with `ray symmetric-run` and the whole command."""
    nodes = []
    for call in Path(environment["CALLS"]).read_text().split("----\n")[:-1]:
        words = call.splitlines()
        split = words.index("--")
        assert words[:5] == ["symmetric-run", "--address", "10.0.0.1:6379", "--min-nodes", str(count)]
        assert words[split + 1 :] == ["env", "RAY_ADDRESS=10.0.0.1:6379", *command]
        options = start.make_context("start", list(curate_and_validate_ray_start_args(words[1:split]))).params
        resources = json.loads(options["resources"])
        [role] = (key.removeprefix("taid_") for key in resources)
        assert options["labels"] == f"taid/role={role}"
        nodes.append({"CPU": options["num_cpus"], "GPU": options["num_gpus"], **resources})
    return nodes


TRAIN = ["taid-ray", "train", f"{IN_IMAGE}taid_ray/configs/tinyswallow.yaml", "--out", "/mnt/taid/runs/a run"]


@pytest.mark.parametrize("script", ["two-roles.sbatch", "one-partition.sbatch"])
def test_a_batch_job_starts_both_roles_and_the_run_fits(script: str, submitted: dict[str, str]) -> None:
    lists = {"SLURM_JOB_NODELIST_HET_GROUP_0": "a1", "SLURM_JOB_NODELIST_HET_GROUP_1": "h1"}
    if script == "one-partition.sbatch":
        lists = {"SLURM_JOB_NODELIST": "g1,g2", "SLURM_JOB_NUM_NODES": "2"}
    assert batch(submitted | lists, script, *TRAIN) == 0
    nodes = started_nodes(submitted, TRAIN, 2)
    assert sorted(key for node in nodes for key in node if key.startswith("taid_")) == [
        STUDENT_RESOURCE,
        TEACHER_RESOURCE,
    ]
    check_fits(config_of(shlex.join(TRAIN)), [(1, node) for node in nodes])


def test_a_batch_job_on_equal_nodes_deals_out_the_roles(submitted: dict[str, str]) -> None:
    lists = {"SLURM_JOB_NODELIST": "g1,g2,g3,g4,g5", "SLURM_JOB_NUM_NODES": "5", "STUDENT_NODES": "2"}
    assert batch(submitted | lists, "one-partition.sbatch", *TRAIN) == 0
    roles = [key for node in started_nodes(submitted, TRAIN, 5) for key in node if key.startswith("taid_")]
    assert roles == [STUDENT_RESOURCE] * 2 + [TEACHER_RESOURCE] * 3  # the head is a student's node: the first


@pytest.mark.parametrize("script", ["two-roles.sbatch", "one-partition.sbatch"])
def test_a_batch_job_ends_with_the_code_of_its_command(script: str, submitted: dict[str, str]) -> None:
    names = ("SLURM_JOB_NODELIST", "SLURM_JOB_NODELIST_HET_GROUP_0", "SLURM_JOB_NODELIST_HET_GROUP_1")
    lists = dict.fromkeys(names, "g1") | {"SLURM_JOB_NUM_NODES": "1"}
    assert batch(submitted | lists, script, "fails") == 7
    assert batch(submitted | lists, script) == 2  # no command
