"""Dashboards and alerts: current, well-formed, and asking only for what the code exports."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from disagg.service.exposition import merge_expositions
from disagg.service.metrics import FrontendMetrics, WorkerMetrics
from disagg.service.router_metrics import RouterMetrics
from disagg.types import Role, WorkerInfo

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "disagg"
RULES = CHART / "rules" / "disagg.yaml"
RULE_TESTS = Path(__file__).with_name("monitoring_rules_test.yaml")
# What Prometheus itself adds.
TARGET_LABELS = {"job", "instance"}
_SELECTOR = re.compile(r"\b((?:disagg|ALERTS)[a-zA-Z0-9_:]*)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)")


def exported() -> dict[str, dict[str, set[str]]]:
    """Return {sample name: {label: values}} of everything that a cluster exposes."""
    frontend = FrontendMetrics()
    frontend.describe("1", lambda role: 1, {"ttft": 1.0, "tpot": 1.0}, lambda: True)
    frontend.placements.labels("prefix_aware", "local")
    parts = [("frontend-1", frontend.exposition())]
    for role in Role:
        info = WorkerInfo(f"{role.value}-0", "x", role, "h:1", "h", 1, 1, 1, 1, 1, 1)
        worker = WorkerMetrics(info)
        worker.observe_pull("shm", 1, 0.1)
        parts.append((info.worker_id, worker.exposition()))
    parts.append(("router", RouterMetrics().exposition({}, {("prefix_aware", "local"): 1}, 1)))
    names: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(merge_expositions(parts).decode()):
        for sample in family.samples:
            labels = names.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return names


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels(name: str) -> Iterator[dict[str, Any]]:
    board = json.loads((CHART / "dashboards" / name).read_text())
    for panel in board["panels"]:
        yield from panel.get("panels", []) or [panel]


def expressions() -> list[tuple[str, str]]:
    found = [
        (f"{path.stem}: {panel['title']}", target["expr"])
        for path in sorted((CHART / "dashboards").glob("*.json"))
        for panel in panels(path.name)
        for target in panel.get("targets", [])
    ]
    return found + [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]


def known_labels() -> dict[str, dict[str, set[str]]]:
    known = exported()
    for rule in rules():
        if "record" in rule:
            labels = known.setdefault(rule["record"], {})
            labels.setdefault("slo", {"ttft", "tpot"}).update(rule.get("labels", {}).values())
    known["ALERTS"] = {"alertname": set(), "severity": set(), "alertstate": set()}
    return known


KNOWN = known_labels()


def problems(expression: str) -> Iterator[str]:
    """Yield what an expression asks for that nothing exports."""
    allowed: set[str] = set(TARGET_LABELS)
    for name, matchers in _SELECTOR.findall(expression):
        if name not in KNOWN:
            if not expression.split(name)[0].endswith('"'):
                yield f"unknown metric {name}"
            continue
        allowed |= set(KNOWN[name])
        for label, operator, value in _MATCHER.findall(matchers):
            if label in TARGET_LABELS or value.startswith("$"):
                continue
            if label not in KNOWN[name]:
                yield f"{name} has no label {label}"
            values = value.split("|") if "~" in operator else [value]
            if KNOWN[name].get(label) and not KNOWN[name][label].issuperset(values):
                yield f"{name}: {label} is never {value}"
    for labels in _GROUPING.findall(expression):
        for label in filter(None, (each.strip() for each in labels.split(","))):
            if label not in allowed:
                yield f"grouped by {label}, which no metric in it has"


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_expression_asks_only_for_what_the_code_exports(where: str, expression: str) -> None:
    assert list(problems(expression)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "sum(rate(disagg_no_such_metric_total[5m]))",
        'disagg_workers{colour="red"}',
        'disagg_workers{state="asleep"}',
        'rate(disagg_requests_total{outcome=~"error|oops"}[5m])',
        "sum by (worker) (disagg_workers)",
        "disagg_time_to_first_token_seconds",
        "disagg:slo_miss:ratio_rate7w",
    ],
)
def test_a_wrong_expression_is_noticed(wrong: str) -> None:
    assert list(problems(wrong))


def test_committed_files_are_what_the_generator_makes() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="in the extra [dev]")
    from deploy.monitoring.generate import stale

    assert stale() == [], "run `python -m deploy.monitoring.generate`"


def test_panels_have_a_unit_a_description_and_distinct_places() -> None:
    for path in (CHART / "dashboards").glob("*.json"):
        taken: set[tuple[int, int]] = set()
        for panel in panels(path.name):
            if panel["type"] == "row":
                continue
            assert panel["description"], panel["title"]
            if panel["type"] != "state-timeline":
                assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            place = panel["gridPos"]
            cells = set(
                itertools.product(
                    range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
                )
            )
            assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
            taken |= cells


def test_dashboards_have_ids_that_stay() -> None:
    boards = [json.loads(path.read_text()) for path in (CHART / "dashboards").glob("*.json")]
    assert sorted(board["uid"] for board in boards) == ["disagg-overview", "disagg-workers"]


def test_every_alert_has_a_runbook_that_exists() -> None:
    text = (ROOT / "deploy" / "runbooks.md").read_text()
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.+)$", text, re.M)}
    for rule in rules():
        if "alert" not in rule:
            continue
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert page == "deploy/runbooks.md" and anchor in anchors, rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]
    links = re.findall(r"\]\(#([a-z]+)\)", text)
    assert links and set(links) <= anchors


def promtool() -> str:
    """Return where promtool is. Debian's package `prometheus` has it; PROMTOOL names one elsewhere."""
    found = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool on PATH or in PROMTOOL (Debian package prometheus)")
    return found


def test_promtool_accepts_the_rules() -> None:
    subprocess.run([promtool(), "check", "rules", str(RULES)], check=True, capture_output=True)


def test_alerts_fire_when_they_should_and_only_then() -> None:
    run = subprocess.run(
        [promtool(), "test", "rules", str(RULE_TESTS)], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alert_has_a_case_in_which_it_fires_and_one_moment_in_which_it_does_not() -> None:
    cases = yaml.safe_load(RULE_TESTS.read_text())["tests"]
    names = {rule["alert"] for rule in rules() if "alert" in rule}
    for name in names:
        checks = [check for case in cases if name in case["name"] for check in case["promql_expr_test"]]
        assert any(name in sample["labels"] for check in checks for sample in check["exp_samples"]), name
        assert any("ALERTS" in check["expr"] and not check["exp_samples"] for check in checks), name


def test_promtool_accepts_the_exposition() -> None:
    metrics = FrontendMetrics()
    metrics.describe("1", lambda role: int(role is Role.PREFILL), {"ttft": 1.0}, lambda: True)
    metrics.ttft.observe(0.1)
    merged = merge_expositions([("a", metrics.exposition()), ("b", metrics.exposition())])
    run = subprocess.run([promtool(), "check", "metrics"], input=merged, capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr
