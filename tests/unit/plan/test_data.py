"""What preparing and reading the data costs, against sums worked out by hand."""

from io import StringIO

import pytest
from rich.console import Console

from taid_ray.cli.quickstart import quickstart_config
from taid_ray.plan import rates
from taid_ray.plan.data import DataPreparation, data_preparation, row_s, step_read_s
from taid_ray.plan.forecast import forecast
from taid_ray.plan.hardware import hardware_named
from taid_ray.plan.inputs import PlanInputs, read_models
from taid_ray.plan.tables import time_table

GLOBAL = quickstart_config(("data.sequence_length=200", "student.cpus_per_worker=2"), "unused")
BLOCKS = quickstart_config(("data.sequence_length=200", "data.order=blocks"), "unused")


def test_preparing_takes_the_workers_cpus_and_four_bytes_and_a_bit_per_token() -> None:
    """1e9 tokens at 1e6 per second on each of 10 CPUs; 5,000,000 rows of 20 bytes in the index."""
    assert data_preparation(GLOBAL, 5, 1e9) == DataPreparation(1e9, 10, 100, 4.125e9, 1e8)
    assert data_preparation(BLOCKS, 5, 1e9) is None
    few = quickstart_config(("student.cpus_per_worker=0.25",), "unused")
    assert data_preparation(few, 2, 1e6) == DataPreparation(1e6, 1, 1, 4.125e6, 1e6 / few.data.sequence_length * 20)


def test_a_worker_reads_its_own_rows_or_encodes_those_of_all() -> None:
    assert (row_s(GLOBAL), row_s(BLOCKS)) == pytest.approx((1e-5, 2e-4))
    assert step_read_s(GLOBAL, 1e-5, 16, 512) == pytest.approx(16e-5 + 512 * 16 * 5e-8)
    assert step_read_s(BLOCKS, 2e-4, 16, 512) == pytest.approx(512 * 16 * 2e-4)


def test_the_plan_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "WORKERS", (1,))
    for config, shown in ((GLOBAL, True), (BLOCKS, False)):
        found = forecast(PlanInputs(config, read_models(config), hardware_named("cpu")), utilisation=0.4)
        assert (found.as_dict()["data"] is not None) == shown
        console = Console(width=100, file=(text := StringIO()))
        console.print(time_table(found))
        line = "1 G tokens of documents are encoded in 8.3 minutes on 2 CPU(s), once"
        assert (line in text.getvalue()) == shown
        assert ("and take 4.12 GB, with an index of 100 MB" in text.getvalue()) == shown
