"""What the documents point to is there: files, modules, tests and targets of make."""

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_everything_that_is_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    paths = re.findall(r"`((?:taid_ray|tests|cluster|tune_spaces|benchmarks|docs)/[\w./-]+)`", text)
    missing += [path for path in paths if not re.search(r"[A-Z]{4}|\.\.\.", path) and not (ROOT / path).exists()]
    tests = {
        path.relative_to(ROOT / "tests").with_suffix("").as_posix() for path in (ROOT / "tests").rglob("test_*.py")
    }
    named = re.findall(r"`((?:[\w/]+/)?test_\w+)`", text)
    missing += [name for name in named if not any(f"/{test}".endswith(f"/{name}") for test in tests)]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    missing += [target for target in re.findall(r"(?:`| {4})make ([a-z][\w-]+)", text) if target not in targets]
    assert not missing
