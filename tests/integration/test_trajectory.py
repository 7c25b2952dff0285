"""One trajectory: the same configuration gives the same losses and the same t, however the work is laid out.

All layouts of one world size share a single Ray Train start, and each kind of teacher pool is started once.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.driver.launch import start_worker
from taid_ray.driver.preflight import prepare
from taid_ray.files import read_lines
from taid_ray.run.directory import write_config
from taid_ray.scheduler.owner import SchedulerOwner
from taid_ray.student.spec import WorkerSpec
from taid_ray.teacher.pool.deployment import PoolSpec
from taid_ray.teacher.pool.lifecycle import start_pool, stop_pool
from tests.support.paths import BUNDLE
from tests.support.reference import reference_run
from tests.support.store import prepare_here

STEPS = 6

# replicas, shards, payload
POOLS = {"1x1": (1, 1, "hidden"), "2x1": (2, 1, "hidden"), "1x2": (1, 2, "hidden"), "logits": (1, 1, "logits")}
Layout = tuple[str, int, int, str]
"""Pool, `local` for a teacher in the workers, or one of SFT; ZeRO stage; micro-batch size; order of the data, or `mixture` for
two sources in the global order."""
SFT = ("none", "validated")
"""The loss sft without a teacher, and with a local one that validations alone ask."""
# By number of workers. 5 rows per step: on 2 workers the split is uneven, and with micro-batches of 1 the smaller share
# leaves a worker an empty micro-batch.
LAYOUTS: dict[int, list[Layout]] = {
    1: [
        ("local", 2, 5, "global"),
        ("1x1", 0, 2, "global"),
        ("2x1", 3, 1, "global"),
        ("1x2", 1, 5, "blocks"),
        ("logits", 2, 2, "global"),
        ("local", 1, 2, "mixture"),
        ("none", 0, 2, "blocks"),
        ("validated", 2, 5, "global"),
        ("1x1", 3, 1, "global"),
    ],
    2: [
        ("local", 0, 3, "global"),
        ("2x1", 1, 1, "blocks"),
        ("1x2", 3, 1, "global"),
        ("logits", 2, 3, "global"),
        ("1x1", 3, 3, "blocks"),
        ("1x1", 0, 1, "mixture"),
        ("none", 3, 1, "mixture"),
        ("2x1", 1, 1, "global"),
        ("local", 2, 2, "global"),
    ],
}
ORDERS = ("global", "blocks", "mixture")
ALL_LAYOUTS = {
    workers: [
        *product(["local", *POOLS], [0, 1, 2, 3], [1, 2, 5], ORDERS),
        *product(SFT, [0, 1, 2, 3], [1, 2, 5], ["global"]),
    ]
    for workers in (1, 2, 3)
}


CTKD = {"name": "ctkd", "ctkd": {"learning_rate": 0.5, "ramp": 0.5}}
OTHER_LOSSES: dict[Layout, dict[str, Any]] = {
    ("1x1", 3, 1, "global"): CTKD,
    ("2x1", 1, 1, "global"): CTKD,
    ("local", 2, 2, "global"): {"name": "dkd"},
}
"""Layouts with another loss than taid."""


def config_for(layout: Layout, workers: int, out: str) -> DistillConfig:
    pool, zero_stage, micro_batch_size, order = layout
    stories = {name: str(BUNDLE / f"tinystories_{name}.jsonl") for name in ("train", "valid")}
    mixture = [
        {"path": stories["train"], "name": "many", "weight": 1},
        {"path": stories["valid"], "name": "few", "weight": 1},
    ]
    replicas, shards, payload = POOLS.get(pool, (1, 1, "hidden"))
    tree = {
        "out": out,
        "teacher": {
            "model": str(BUNDLE / "stories260k"),
            "dtype": "float32",
            "mode": "pool" if pool in POOLS else "local",
            "replicas": replicas,
            "shards": shards,
            "payload": payload,
            "timeout_s": 120,
            "max_tokens": 192,  # two rows of 96: requests of more rows are split
        },
        "student": {
            "init": "cut",
            "layers": [0, 4],
            "dtype": "float32",
            "workers": workers,
            "zero_stage": zero_stage,
        },
        "data": {
            "train": mixture if order == "mixture" else stories["train"],
            "valid": None if order == "mixture" else stories["valid"],
            "valid_documents": 3,
            "sequence_length": 96,
            "block_documents": 16,
            "order": "blocks" if order == "blocks" else "global",
        },
        # alpha far above the default, so that the adaptive rule and not the floor moves t
        "schedule": {"alpha": 1.0, "beta": 0.5},
        "loss": {"memory_mib": 1} | OTHER_LOSSES.get(layout, {}),
        "train": {
            "steps": STEPS,
            "batch_size": 5,
            "micro_batch_size": micro_batch_size,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "max_grad_norm": 0.8,
        },
    }
    if pool in SFT:
        student = {
            "init": "scratch",
            "layers": None,
            "model": str(BUNDLE / "stories260k"),
            "architecture": {"num_hidden_layers": 2},
        }
        tree |= {"student": tree["student"] | student, "loss": {"name": "sft", "memory_mib": 1}}
    if pool == "none":
        tree["teacher"] = None
    return build_config(tree)


@pytest.fixture(scope="module")
def references() -> dict[str, list[dict[str, float]]]:
    """The plain run by loss and order of the data."""
    kinds: list[Layout] = [(pool, 0, 5, order) for pool, order in product(("local", "none"), ORDERS)]
    kinds += {reference_of(layout): layout for layout in OTHER_LOSSES}.values()
    return {reference_of(kind): reference_run(config_for(kind, 1, "unused")) for kind in kinds}


def reference_of(layout: Layout) -> str:
    loss = OTHER_LOSSES.get(layout, {"name": "sft" if layout[0] in SFT else "taid"})["name"]
    return f"{loss} {layout[3]}"


@pytest.fixture(scope="module")
def pools(ray_cluster: Any) -> Iterator[dict[str, str]]:
    """Names of the teacher pools by kind, started side by side."""
    names = {kind: f"trajectory-{kind}" for kind in POOLS}

    def start(kind: str) -> None:
        config = config_for((kind, 2, 5, "global"), 1, "unused")
        num_shared = prepare(config).vocabulary.num_shared
        start_pool(PoolSpec(config.teacher, num_shared, "cpu", use_role_resources=True), names[kind])

    with ThreadPoolExecutor() as threads:
        list(threads.map(start, POOLS))
    yield names
    for name in names.values():
        stop_pool(name)


def run_jobs(arguments: dict[str, Any]) -> None:
    for job in arguments["jobs"]:
        start_worker({"worker": job})


@pytest.fixture(
    scope="module",
    params=[
        *(
            pytest.param((workers, layouts), id=f"{workers}", marks=pytest.mark.timeout(900))
            for workers, layouts in LAYOUTS.items()
        ),
        *(
            pytest.param(
                (workers, layouts), id=f"{workers}-all", marks=[pytest.mark.layouts, pytest.mark.timeout(5400)]
            )
            for workers, layouts in ALL_LAYOUTS.items()
        ),
    ],
)
def run_dirs(
    request: pytest.FixtureRequest, pools: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[Layout, Path]:
    """The run directory of every layout of one number of workers."""
    workers, layouts = request.param
    root = tmp_path_factory.mktemp(f"trajectory-{workers}")
    jobs, schedulers = [], []
    for layout in layouts:
        pool, order = layout[0], layout[3]
        label = "-".join(map(str, layout))
        config = config_for(layout, workers, str(root / label))
        write_config(config)
        spec = prepare(config)
        name = f"scheduler-{workers}-{label}"
        schedulers.append(SchedulerOwner(name, config.effective_schedule, spec.total_steps, workers))
        schedulers[-1].set_pool(None)
        jobs.append(
            WorkerSpec(
                config,
                spec,
                "cpu",
                schedulers[-1].actor,
                pools.get(pool, ""),
                str(config.run_dir / "checkpoints"),
                data=None if order == "blocks" else prepare_here(config),
            )
        )
    TorchTrainer(
        run_jobs,
        train_loop_config={"jobs": jobs},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1, "taid_student": 1}),
        run_config=RunConfig(name=f"trajectory-{workers}", storage_path=str(root / "train")),
    ).fit()
    for scheduler in schedulers:
        scheduler.close()
    return {layout: job.config.run_dir for layout, job in zip(layouts, jobs, strict=True)}


@pytest.fixture(scope="module")
def runs(run_dirs: dict[Layout, Path]) -> dict[Layout, list[dict[str, Any]]]:
    """metrics.jsonl of every layout."""
    return {layout: read_lines(run_dir / "metrics.jsonl") for layout, run_dir in run_dirs.items()}


def test_every_layout_follows_the_reference(
    runs: dict[Layout, list[dict[str, Any]]], references: dict[str, list[dict[str, float]]]
) -> None:
    for layout, lines in runs.items():
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), layout
        for line, expected in zip(lines, references[reference_of(layout)], strict=True):
            assert ("kl" in line) == ("t" in line) == ("kl" in expected)
            for key in {"t", "loss", "kl", "temperature"} & expected.keys():
                assert line[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-5), (layout, line["step"], key)
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), (layout, line["step"])
            assert line["tokens"] == expected["tokens"], layout
            assert ("sources" in line) == (layout[3] == "mixture"), layout
            for name, found in zip(("many", "few"), expected["sources"], strict=False):
                assert_same_source(line.get("sources", {}).get(name), found, "kl" in line)


def assert_same_source(line: dict[str, float] | None, expected: dict[str, float], compared: bool) -> None:
    """Compares the figures of one source in one step; without a loss position of it there are none. compared: with a teacher."""
    if not expected["tokens"]:
        assert line is None
    elif line is not None:
        assert line["tokens"] == expected["tokens"]
        assert ("kl" in line) == compared
        for key in {"loss", "kl"} & line.keys():
            assert line[key] == pytest.approx(expected[key], rel=0, abs=1e-5)


def test_sources_are_validated_apart(run_dirs: dict[Layout, Path]) -> None:
    for layout, run_dir in run_dirs.items():
        if layout[3] == "mixture":
            lines = read_lines(run_dir / "validation.jsonl")
            parts = lines[-1]["sources"]
            assert list(parts) == ["many", "few"] and all(part["tokens"] for part in parts.values())
            assert ("kl" in parts["many"]) == ("kl" in lines[-1]) == (layout[0] != "none")
            for key in {"cross_entropy", "teacher_cross_entropy", "kl"} & parts["many"].keys():
                whole = sum(part[key] * part["tokens"] for part in parts.values()) / lines[-1]["tokens"]
                assert lines[-1][key] == pytest.approx(whole, rel=1e-12)
                assert parts["many"][key] != parts["few"][key]


@pytest.mark.parametrize("order", ORDERS)
def test_the_reference_is_worth_following(order: str, references: dict[str, list[dict[str, float]]]) -> None:
    """The setting exercises what the comparison is about: t moves off its floor, gradients are clipped, ragged counts."""
    reference = references[f"taid {order}"]
    floor = [0.4 + 0.6 * n / STEPS for n in range(STEPS)]
    assert all(step["t"] > floor[i] + 1e-3 for i, step in enumerate(reference) if i >= 2)
    assert any(step["grad_norm"] > 0.8 for step in reference)
    assert len({step["tokens"] for step in reference}) > 1
    assert reference[-1]["loss"] != reference[0]["loss"]
    learned = [step["temperature"] for step in references["ctkd global"]]
    assert max(learned) - min(learned) > 1
