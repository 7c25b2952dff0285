"""One trajectory: the same configuration gives the same losses and the same t, however the work is laid out.

All layouts of one world size share a single Ray Train start, and each kind of teacher pool is started once.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
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
from tests.support.image_runs import documents_by_transformers, image_keys, write_image_rows
from tests.support.paths import BUNDLE
from tests.support.reference import reference_run
from tests.support.store import prepare_here
from tests.support.tiny_vision import save_tiny, tiny_tokenizer

STEPS = 6

# replicas, shards, payload
POOLS = {"1x1": (1, 1, "hidden"), "2x1": (2, 1, "hidden"), "1x2": (1, 2, "hidden"), "logits": (1, 1, "logits")}
Layout = tuple[str, int, int, str]
"""Pool, `local` for a teacher in the workers, or one of SFT; ZeRO stage; micro-batch size; order of the data, or `mixture` for
two sources in the global order, or one of FAMILIES for data with images and models that see."""
FAMILIES = ("internvl", "qwen2_5_vl", "smolvlm", "llava")
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
        ("1x1", 3, 1, "internvl"),
        ("local", 2, 1, "qwen2_5_vl"),
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
IMAGE_BATCH = 7
# Accumulation 1 and 4; on 2 workers one has an empty micro-batch.
IMAGE_LAYOUTS = {
    family: {
        workers: [*product(["local", "1x1", "2x1", "1x2"], [0, 2, 3], micro_batch_sizes, [family])]
        for workers, micro_batch_sizes in {1: (7, 2), 2: (4, 1)}.items()
    }
    for family in FAMILIES
}


CTKD = {"name": "ctkd", "ctkd": {"learning_rate": 0.5, "ramp": 0.5}}
OTHER_LOSSES: dict[Layout, dict[str, Any]] = {
    ("1x1", 3, 1, "global"): CTKD,
    ("2x1", 1, 1, "global"): CTKD,
    ("local", 2, 2, "global"): {"name": "dkd"},
}
"""Layouts with another loss than taid."""


@cache
def image_files(family: str) -> Path:
    """A directory with rows that have no, one and three images, a teacher and a student; of this process."""
    directory = Path(IMAGE_FILES.name) / family
    write_image_rows(directory, 24)
    for seed, name in enumerate(("teacher", "student")):
        # Without rows of the head that no token has: the plain loop does not cut them off.
        save_tiny(family, directory / name, seed, vocab_size=len(tiny_tokenizer(family)))
    return directory


IMAGE_FILES = tempfile.TemporaryDirectory(prefix="taid-trajectory-")


def image_config(tree: dict[str, Any], family: str) -> dict[str, Any]:
    """The configuration `tree` with models of a family, and data with images."""
    directory = image_files(family)
    data = image_keys(directory) | {"valid_documents": 3, "sequence_length": 256, "sees_at_least": 0.0}
    student = {"model": str(directory / "student"), "init": "pretrained", "layers": None}
    # AdamW would make much of the noise in gradients that are zero in theory, such as those of the biases of keys.
    train = {"batch_size": IMAGE_BATCH, "epsilon": 1e-4}
    return tree | {
        "teacher": tree["teacher"] | {"model": str(directory / "teacher"), "max_tokens": 512, "cpus_per_shard": 0.5},
        "student": tree["student"] | student,
        "data": data,
        "train": tree["train"] | train,
    }


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
    return build_config(image_config(tree, order) if order in FAMILIES else tree)


@pytest.fixture(scope="module")
def references() -> dict[str, list[dict[str, float]]]:
    """The plain run by loss and order of the data."""
    kinds: list[Layout] = [(pool, 0, 5, order) for pool, order in product(("local", "none"), ORDERS)]
    kinds += {reference_of(layout): layout for layout in OTHER_LOSSES}.values()
    return {reference_of(kind): reference_run(config_for(kind, 1, "unused")) for kind in kinds}


@cache
def image_reference(family: str) -> list[dict[str, float]]:
    """The plain run on data with images, one document after another as transformers takes them."""
    config = config_for(("local", 0, IMAGE_BATCH, family), 1, "unused")
    return reference_run(config, partial(documents_by_transformers, family, image_files(family)))


def reference_of(layout: Layout) -> str:
    loss = OTHER_LOSSES.get(layout, {"name": "sft" if layout[0] in SFT else "taid"})["name"]
    return f"{loss} {layout[3]}"


class Pools:
    """Teacher pools, each started once."""

    def __init__(self) -> None:
        self.names: dict[tuple[str, str], str] = {}
        """Names by kind, and family or `text`."""

    def start(self, layouts: Iterable[Layout]) -> None:
        """Starts those that the layouts need, side by side, and stops the others, for which there may be no room."""
        wanted = {pool_of(layout) for layout in layouts if layout[0] in POOLS}
        self.stop(self.names.keys() - wanted)
        kinds = wanted - self.names.keys()
        specs = {kind: pool_spec(*kind) for kind in sorted(kinds)}
        self.names |= {(pool, family): f"trajectory-{pool}-{family}" for pool, family in kinds}
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda kind: start_pool(specs[kind], self.names[kind]), specs))

    def stop(self, kinds: Iterable[tuple[str, str]]) -> None:
        """Stops those of some kinds."""
        for kind in [*kinds]:
            stop_pool(self.names.pop(kind))


def pool_spec(pool: str, family: str) -> PoolSpec:
    config = config_for((pool, 2, 5, "global" if family == "text" else family), 1, "unused")
    spec = prepare(config)
    shared = spec.vocabulary.num_shared
    return PoolSpec(config.given_teacher, shared, "cpu", use_role_resources=True, media=spec.media)


def pool_of(layout: Layout) -> tuple[str, str]:
    return layout[0], layout[3] if layout[3] in FAMILIES else "text"


@pytest.fixture(scope="module")
def pools(ray_cluster: Any) -> Iterator[Pools]:
    started = Pools()
    yield started
    started.stop(started.names)


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
                (workers, layouts), id=f"{workers}-{name}", marks=[pytest.mark.layouts, pytest.mark.timeout(5400)]
            )
            for name, matrix in {"all": ALL_LAYOUTS, **IMAGE_LAYOUTS}.items()
            for workers, layouts in matrix.items()
        ),
    ],
)
def run_dirs(
    request: pytest.FixtureRequest, pools: Pools, tmp_path_factory: pytest.TempPathFactory
) -> dict[Layout, Path]:
    """The run directory of every layout of one number of workers."""
    workers, layouts = request.param
    pools.start(layouts)
    root = tmp_path_factory.mktemp(f"trajectory-{workers}")
    jobs, schedulers = [], []
    for layout in layouts:
        order = layout[3]
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
                pools.names.get(pool_of(layout), ""),
                str(config.run_dir / "checkpoints"),
                data=None if order == "blocks" else prepare_here(config),
            )
        )
    TorchTrainer(
        run_jobs,
        train_loop_config={"jobs": jobs},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.5, "taid_student": 1}),
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
        reference = image_reference(layout[3]) if layout[3] in FAMILIES else references[reference_of(layout)]
        for line, expected in zip(lines, reference, strict=True):
            assert ("kl" in line) == ("t" in line) == ("kl" in expected)
            for key in {"t", "loss", "kl", "temperature"} & expected.keys():
                assert line[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-5), (layout, line["step"], key)
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), (layout, line["step"])
            assert line["tokens"] == expected["tokens"], layout
            assert ("sources" in line) == (layout[3] == "mixture"), layout
            for name, found in zip(("many", "few"), expected["sources"], strict=False):
                assert_same_source(line.get("sources", {}).get(name), found, "kl" in line)


def test_images_are_counted_and_seen(run_dirs: dict[Layout, Path]) -> None:
    """However the work is laid out; their bytes are sent to a pool, each request's equal ones once."""
    counts, seen = defaultdict(set), defaultdict(list)
    for layout, run_dir in run_dirs.items():
        lines = read_lines(run_dir / "metrics.jsonl")
        if layout[3] not in FAMILIES:
            assert not any({"images", "image_bytes"} & line.keys() for line in lines)
            continue
        counts[layout[3]].add(tuple(line["images"] for line in lines))
        assert all(bool(line["image_bytes"]) == (layout[0] in POOLS) for line in lines)
        seen[layout[3]].append([line["seeing"] for line in read_lines(run_dir / "validation.jsonl")])
    for family, found in counts.items():
        assert len(found) == 1 and min(*found) > 0
        assert all(value > 0 for value in seen[family][0])
        assert all(values == pytest.approx(seen[family][0], rel=1e-3, abs=1e-7) for values in seen[family])


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
