"""Two runs without a teacher, one from the cache and one from the file that was exported from it, have the same figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from taid_ray import build_config, distill
from taid_ray.driver.cache_export import export_cache
from taid_ray.driver.cache_fill import fill_cache
from tests.support.harness import SAME, small_config
from tests.support.paths import BUNDLE


@pytest.mark.more
@pytest.mark.timeout(900)
def test_a_run_from_a_file_is_that_from_the_cache(ray_cluster: str, tmp_path: Path) -> None:
    lines = (BUNDLE / "tinystories_train.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    (tmp_path / "stories.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tree = small_config(
        "outputs",
        teacher={"payload": "topk", "topk": 8, "replicas": 1},
        data={"train": str(tmp_path / "stories.jsonl")},
        train={"steps": 8, "batch_size": 4, "eval_every": 4},
    )
    cache = {"cache.directory": str(tmp_path / "cache")}
    warm = build_config(tree, values=cache | {"teacher.mode": "local"})
    fill_cache(warm)
    export_cache(warm, tmp_path / "outputs.parquet")
    copied = {"cache.directory": str(tmp_path / "copied"), "teacher.outputs": str(tmp_path / "outputs.parquet")}

    def run(name: str, values: dict[str, Any]) -> tuple[list[Any], Any]:
        result = distill(
            build_config(tree, values=values | {"teacher.mode": name, "out": str(tmp_path / f"run-{name}")})
        )
        written = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
        figures = [result.summary[key] for key in ("teacher", "before", "after", "payload_error")]
        return [[line[key] for key in SAME] for line in written], figures

    cached, filed = run("cache", cache), run("file", copied)
    assert len(cached[0]) == 8 and cached == filed
