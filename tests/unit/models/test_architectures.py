"""An architecture of each kind is refused or exact, as docs/architectures.md says; `make test-architectures` tries all."""

from pathlib import Path

import pytest

from tests.support.architectures.table import page_rows, tried


# Soft caps and a sliding window; experts and latent attention; a state space; a head with a layer of its own.
@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3", "mamba", "bert, no decoder"])
def test_it_is_refused_or_exact(name: str, tmp_path: Path) -> None:
    row, wrong = tried(name, tmp_path, None)
    *found, _, reason = row
    *expected, _, expected_reason = page_rows()[name]  # but for what takes further processes
    assert not wrong
    assert (found, reason) == (expected, expected_reason)
