"""A run that the cluster can never place is refused before anything of it starts."""

from pathlib import Path
from typing import Any

import pytest

from taid_ray import build_config, distill
from taid_ray.errors import ClusterError
from tests.support.paths import BUNDLE


@pytest.mark.parametrize(
    ("section", "key", "count", "asked"),
    [
        ("student", "workers", 100, "1 teacher replica(s) x 1 shard(s)"),
        ("teacher", "replicas", 9, "9 teacher replica(s) x 1 shard(s)"),
    ],
)
def test_more_than_the_cluster_has(
    ray_cluster: str, tmp_path: Path, section: str, key: str, count: int, asked: str
) -> None:
    tree: dict[str, Any] = {
        "out": str(tmp_path / "run"),
        "teacher": {"model": str(BUNDLE / "stories260k")},
        "student": {"init": "cut", "layers": [0, 4], "dtype": "float32"},
        "data": {"train": str(BUNDLE / "tinystories_valid.jsonl"), "valid_documents": 4, "sequence_length": 64},
        "train": {"steps": 2, "batch_size": 2},
    }
    tree[section][key] = count
    with pytest.raises(ClusterError) as refused:
        distill(build_config(tree))
    message = str(refused.value)
    assert asked in message and f"{tree['student'].get('workers', 1)} student worker(s)" in message
    assert "1 x (8 CPU" in message
    assert f"{section}.{key}" in message
    assert list(tmp_path.iterdir()) == []
