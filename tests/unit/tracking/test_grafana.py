"""The dashboard asks for what the code exports, all of it and nothing else, and is one that Grafana can lay out."""

import json
import re
from itertools import combinations
from typing import Any

import pytest
from ray.util.metrics import Counter, Histogram

from taid_ray.run.metrics import PHASES, StepMetrics
from taid_ray.tracking.prometheus import METRICS, OWN_TAGS, SECONDS, Instruments
from tests.support.paths import ROOT

DASHBOARD = ROOT / "cluster" / "grafana" / "taid-ray.json"


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def exported() -> dict[str, set[str]]:
    """Names in Prometheus of each metric, as Ray makes them."""
    names = {}
    for name, (kind, _) in METRICS.items():
        endings = {Counter: ["_total"], Histogram: ["_bucket", "_count", "_sum"]}.get(kind, [""])
        names[name] = {f"ray_{name}{ending}" for ending in endings}
    return names


def test_every_query_is_of_a_metric_that_the_code_exports(queries: list[str]) -> None:
    known = set().union(*exported().values())
    for query in queries:
        used = set(re.findall(r"\bray_\w+", query))
        assert used and used <= known, (query, used - known)


def test_every_metric_is_on_the_dashboard(queries: list[str]) -> None:
    shown = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert not [name for name, names in exported().items() if not names & shown]


def test_every_metric_is_narrowed_to_the_runs_that_were_chosen(queries: list[str]) -> None:
    for query in queries:
        assert len(re.findall(r"\bray_\w+", query)) == query.count('{run=~"$run"}'), query
        assert "rate(sum" not in query.replace(" ", ""), "a restart would count as a fall of the sum"
        for name in re.findall(r"\bray_taid_\w+_total\b|\bray_taid_\w+_bucket\b", query):
            assert re.search(rf"(rate|increase)\({name}", query), query


def test_panels_have_places_of_their_own(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    titles = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert titles == ["Training", "Teacher", "Throughput", "Failures"]
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["h"] > 0
        references = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(references)) == len(references)
        assert bool(references) == (panel["type"] != "row")
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or apart, (one, other)


def test_it_can_be_imported_anywhere(dashboard: dict[str, Any]) -> None:
    """The data source is a variable, not the one of the machine it was made on."""
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "run"}
    assert set(re.findall(r'"uid": "([^"]*)"', json.dumps(dashboard))) == {"taid-ray", "${datasource}"}
    assert "id" not in dashboard
    for text in re.findall(r"\$\{?(\w+)", json.dumps(dashboard)):
        assert text in {"datasource", "run", "__rate_interval", "__all"}


def test_metrics_are_named_and_tagged_as_prometheus_wants() -> None:
    for name, (kind, meaning) in METRICS.items():
        assert re.fullmatch(r"taid_[a-z_]+", name) and not name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert meaning.endswith(".")
        assert kind is Histogram or not name.endswith("_ms")
    assert set(OWN_TAGS) <= set(METRICS)
    assert all(f"{phase}_s" in StepMetrics.__dataclass_fields__ for phase in PHASES)
    assert list(SECONDS) == sorted(set(SECONDS)) and SECONDS[0] > 0


def test_a_figure_without_ray_does_nothing() -> None:
    """No cluster, no agent: nobody hears it, nothing fails."""
    instruments = Instruments("run-1", "student")
    instruments.set("taid_step", 1)
    instruments.add("taid_tokens", 0)
    instruments.add("taid_phase_seconds", 0.5, "data")
    instruments.observe("taid_step_seconds", 0.1)
    instruments.refresh()
