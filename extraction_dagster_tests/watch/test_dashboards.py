"""The files for Prometheus and Grafana ask only for metrics that there are, in expressions that can be parsed."""

import json
import re
from itertools import combinations
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from extraction_dagster.watch.exposition import Exposition

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/extraction.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = {
    **{f"panel {panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]},
    **{f"alert {rule['alert']}": rule["expr"] for rule in RULES},
}


@pytest.fixture
def exported(figures, census):
    """Every sample's name, with the labels that it has."""
    families = text_string_to_metric_families(Exposition(figures, census).openmetrics())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_expression_can_be_parsed_and_asks_for_metrics_that_there_are(where, exported):
    expression = EXPRESSIONS[where].replace("$job", "extraction").replace("$instance", "a")
    promql_parser.parse(expression)  # raises where it can't
    names = set(re.findall(r"\bextraction_\w+", expression))
    assert names
    assert names <= exported.keys()


def test_every_metric_is_on_the_dashboard_but_the_version(exported):
    shown = {
        name for where, expr in EXPRESSIONS.items() if "panel" in where for name in re.findall(r"extraction_\w+", expr)
    }
    assert exported.keys() - shown == {"extraction_build_info"}


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_labels_that_are_asked_for_are_those_of_the_metric(where, exported):
    of_targets = {"job", "instance"}
    for name, selector in re.findall(r"(extraction_\w+)\{([^}]*)\}", EXPRESSIONS[where]):
        assert set(re.findall(r"(\w+)\s*(?:=~|!=|=)", selector)) <= exported[name] | of_targets
    used = {label for text in re.findall(r"by \(([^)]*)\)", EXPRESSIONS[where]) for label in re.split(r",\s*", text)}
    assert used <= of_targets.union(*exported.values())


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_legends_name_labels_that_there_are(panel, exported):
    for target in panel["targets"]:
        names = re.findall(r"extraction_\w+", target["expr"])
        labels = set().union(*(exported[name] for name in names))
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels


def test_panels_have_their_own_number_and_place():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


def test_the_dashboard_can_be_imported_anywhere():
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert names == {"datasource", "job", "instance"}
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in PANELS)
    assert DASHBOARD["uid"] == "extraction"
    assert all(panel["description"].endswith(".") for panel in PANELS)


def test_alerts_have_what_an_operator_needs():
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"Extraction[A-Z]\w+", rule["alert"])
        assert re.fullmatch(r"\d+[mh]", rule["for"])
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description"}


def test_commands_that_alerts_name_are_commands():
    from typer.main import get_command  # noqa: PLC0415 - of this test alone

    from extraction_dagster.cli.main import app  # noqa: PLC0415

    commands = set(get_command(app).commands)
    text = json.dumps(ALERTS)
    assert set(re.findall(r"'extraction ([a-z]+)", text)) <= commands


def test_every_alert_is_explained():
    page = (DEPLOY.parent / "docs/monitoring.md").read_text()
    assert [rule["alert"] for rule in RULES if f"`{rule['alert']}`" not in page] == []


def test_every_metric_is_explained(exported):
    page = (DEPLOY.parent / "docs/monitoring.md").read_text()
    assert [name for name in exported if f"`{name}`" not in page] == []
    assert set(re.findall(r"`(extraction_\w+)`", page)) <= exported.keys()
