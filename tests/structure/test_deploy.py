"""What is shipped for Prometheus, Grafana and Kubernetes names things that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from api_stub.gateway.metrics import Metrics as GatewayMetrics
from api_stub.settings import GatewaySettings
from tests import compose
from worker.observability.metrics import PREFIX, READINGS, Metrics
from worker.settings import WorkerSettings

DEPLOY = compose.ROOT / "api_stub" / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def manifests() -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def deployment(name: str) -> dict[str, Any]:
    (found,) = (one for one in manifests() if one["kind"] == "Deployment" and one["metadata"]["name"] == name)
    return found


def container(name: str) -> dict[str, Any]:
    (found,) = deployment(name)["spec"]["template"]["spec"]["containers"]
    result: dict[str, Any] = found
    return result


def exported_names() -> set[str]:
    """Every name that a sample of a worker or a gateway can have."""
    names = {PREFIX + name for name in READINGS}
    for family in Metrics("default").registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    for family in text_string_to_metric_families(GatewayMetrics().exposition({"default": 1}).decode()):
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "visionq.json").read_text())
    return read


def test_the_dashboard_asks_for_metrics_that_are_exported() -> None:
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    asked = set(re.findall(r"visionq_\w+", " ".join(expressions)))
    assert len(asked) > 20
    assert asked <= exported_names()


def test_the_dashboard_shows_what_an_operator_looks_for() -> None:
    titles = {panel["title"] for panel in dashboard()["panels"]}
    assert {
        "Queue depth", "Wait in the queue", "Time to first token", "Between two tokens", "Tokens per second",
        "Cache hits", "Errors by code", "Retries by reason",
    } <= titles  # fmt: skip


def test_panels_do_not_overlap_and_read_the_provisioned_source() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken
        assert all(x < 24 for x, _ in cells)
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == source["uid"]


def test_prometheus_scrapes_the_ports_that_compose_opens() -> None:
    jobs = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    scraped = {found["names"][0]: found["port"] for job in jobs for found in job["dns_sd_configs"]}
    services = compose.load("docker-compose.yml", variables=compose.SECRETS)["services"]
    assert scraped == {
        "worker": int(services["worker"]["environment"]["VISIONQ_HTTP_PORT"]),
        "api": GatewaySettings.model_fields["api_port"].default,
    }


def test_mounted_files_exist() -> None:
    services = compose.load("docker-compose.yml", variables=compose.SECRETS)["services"]
    mounts = [mount for service in services.values() for mount in service.get("volumes", []) if mount.startswith("./")]
    assert len(mounts) == 3
    for mount in mounts:
        path, _, mode = mount.split(":")
        assert (compose.ROOT / path).exists()
        assert mode == "ro"
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DEPLOY / "grafana" / "dashboards" / home.name).exists()


@pytest.mark.parametrize(
    ("name", "drain_s"), [("visionq-worker", 60.0), ("visionq-trainer", 60.0), ("visionq-api", 10.0)]
)
def test_pods_get_time_to_drain_and_no_rights(name: str, drain_s: float) -> None:
    pod = deployment(name)["spec"]["template"]["spec"]
    environment = {variable["name"]: variable["value"] for variable in container(name)["env"]}
    given_s = environment.get("VISIONQ_DRAIN_S", GatewaySettings.model_fields["api_stop_s"].default)
    assert float(given_s) == drain_s
    assert pod["terminationGracePeriodSeconds"] >= drain_s + 15
    assert pod["securityContext"]["runAsNonRoot"]
    assert container(name)["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {"app": name} == deployment(name)["spec"]["selector"]["matchLabels"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("visionq-worker", WorkerSettings), ("visionq-trainer", WorkerSettings), ("visionq-api", GatewaySettings)],
)
def test_pods_are_told_settings_that_exist_and_probed_where_they_listen(name: str, settings: Any) -> None:
    environment = {variable["name"]: variable["value"] for variable in container(name)["env"]}
    told = {variable.removeprefix("VISIONQ_").lower() for variable in environment if variable.startswith("VISIONQ_")}
    assert told <= settings.model_fields.keys()
    (port,) = container(name)["ports"]
    assert port["containerPort"] == int(environment.get("VISIONQ_HTTP_PORT", 8000))
    assert container(name)["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": port["name"]}
    assert container(name)["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": port["name"]}


def test_a_worker_pod_asks_for_a_gpu_and_scales_on_the_depth() -> None:
    assert container("visionq-worker")["resources"]["limits"]["nvidia.com/gpu"] == "1"
    (scaled,) = (one for one in manifests() if one["kind"] == "ScaledObject")
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment("visionq-worker")["metadata"]["name"]
    (trigger,) = scaled["spec"]["triggers"]
    assert set(re.findall(r"visionq_\w+", trigger["metadata"]["query"])) == {"visionq_queue_depth"}
    assert "visionq_queue_depth" in exported_names()
