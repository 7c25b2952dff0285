"""Answers in flight must fit the object stores: counted by requests, and bounded by teacher.window_mib."""

from typing import Any

import pytest

from taid_ray.config.models import TeacherConfig
from taid_ray.distributed.capacity import check_object_store
from taid_ray.errors import ClusterError

MIB = 2**20


def nodes(*sizes_mib: int) -> list[dict[str, Any]]:
    return [{"Alive": True, "Resources": {"object_store_memory": size * MIB}} for size in sizes_mib]


@pytest.mark.parametrize(
    "payload_mib, window, window_mib, workers, stores, fits",
    [
        (100, 4, 1024, 1, (800,), True),
        (100, 4, 1024, 1, (799,), False),
        (100, 4, 1024, 2, (800, 800), True),
        (100, 4, 1024, 2, (800, 799), False),
        (100, 40, 400, 1, (800,), True),  # the window in MiB binds first
        (100, 40, 401, 1, (800,), False),
        (100, 40, 50, 1, (200,), True),  # one request is always in flight
        (100, 40, 50, 1, (199,), False),
    ],
)
def test_half_of_the_stores(
    payload_mib: int, window: int, window_mib: int, workers: int, stores: tuple[int, ...], fits: bool
) -> None:
    teacher = TeacherConfig(model="x", window=window, window_mib=window_mib)
    if fits:
        check_object_store(payload_mib * MIB, teacher, workers, nodes(*stores))
    else:
        with pytest.raises(ClusterError, match=f"teacher.window: {window} .*teacher.window_mib: {window_mib}"):
            check_object_store(payload_mib * MIB, teacher, workers, nodes(*stores))


def test_images_count_for_every_request_under_way() -> None:
    teacher = TeacherConfig(model="x", window=40, window_mib=400)
    check_object_store(100 * MIB, teacher, 2, nodes(3520), image_bytes=12 * MIB)
    with pytest.raises(
        ClusterError, match=r"and images of up to 12 MiB for each of them, for each of 2 .* need 1760 MiB"
    ):
        check_object_store(100 * MIB, teacher, 2, nodes(3519), image_bytes=12 * MIB)
