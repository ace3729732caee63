"""The compose files and Dockerfiles hold what they promise, as far as that can be seen without Docker."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import AliasChoices
from pydantic_settings import BaseSettings

from api_stub.gateway.keys import KeyRing, check_host
from api_stub.settings import GatewaySettings
from tests import compose
from worker.settings import WorkerSettings

ROOT = compose.ROOT
FILES = ("docker-compose.yml", "docker-compose.gpu.yml")
DOCKERFILES = ("worker/Dockerfile", "api_stub/Dockerfile")
SCHEMA = Path(__file__).parent / "compose_spec" / "compose-spec.json"
UNIT_S = {"s": 1, "m": 60}
#: Services that start with `--profile monitoring` only.
MONITORING = {"prometheus", "grafana", "flower"}


@pytest.fixture
def services() -> dict[str, Any]:
    found: dict[str, Any] = compose.load("docker-compose.yml", variables=compose.SECRETS)["services"]
    return found


@pytest.mark.parametrize("file_name", FILES)
def test_compose_files_follow_the_specification(file_name: str) -> None:
    specification = jsonschema.Draft7Validator(json.loads(SCHEMA.read_text()))
    specification.validate(compose.load(file_name))
    specification.validate(compose.load(*FILES, variables=compose.SECRETS))


@pytest.mark.skipif(
    shutil.which("docker-compose") is None and "CI" not in os.environ, reason="no docker-compose on this machine"
)
def test_docker_compose_accepts_the_files() -> None:
    command = ["docker-compose", "-f", FILES[0], "-f", FILES[1], "config", "-q"]
    subprocess.run(command, cwd=ROOT, check=True, env={"PATH": "/usr/bin:/bin:/usr/local/bin"} | compose.SECRETS)


def test_the_services_are_broker_storage_worker_and_gateway(services: dict[str, Any]) -> None:
    assert services.keys() == {"valkey", "seaweedfs", "worker", "api", "trainer"} | MONITORING
    assert services["trainer"]["profiles"] == ["training"]
    assert {name for name, service in services.items() if service.get("profiles") == ["monitoring"]} == MONITORING


def test_images_are_pinned(services: dict[str, Any]) -> None:
    for name in {"valkey", "seaweedfs"} | MONITORING:
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+[\w.-]*", services[name]["image"])
    for path in DOCKERFILES:
        bases = re.findall(r"^FROM (\S+)", (ROOT / path).read_text(), re.MULTILINE)
        assert bases
        assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base) for base in bases)


def test_nothing_runs_as_root(services: dict[str, Any]) -> None:
    for service in services.values():
        assert int(service["user"].split(":")[0]) > 0
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
    for path in DOCKERFILES:
        users = re.findall(r"^USER (\d+):", (ROOT / path).read_text(), re.MULTILINE)
        assert users
        assert int(users[-1]) > 0
    assert services["worker"]["user"] == services["api"]["user"] == "10001:10001"


def test_worker_and_gateway_wait_for_healthy_servers(services: dict[str, Any]) -> None:
    for name in ("valkey", "seaweedfs"):
        for service in ("worker", "api"):
            assert services[service]["depends_on"][name] == {"condition": "service_healthy"}
        assert {"test", "interval", "timeout", "retries", "start_period"} <= services[name]["healthcheck"].keys()


def test_everything_that_must_last_is_on_a_named_volume(services: dict[str, Any]) -> None:
    declared = compose.load("docker-compose.yml")["volumes"].keys()
    mounted = {
        name: dict(volume.split(":") for volume in service["volumes"] if volume[0] not in "./")
        for name, service in services.items()
        if "volumes" in service
    }
    assert mounted == {
        "valkey": {"valkey-data": "/data"},
        "seaweedfs": {"seaweedfs-data": "/data"},
        "worker": {"models": services["worker"]["environment"]["HF_HOME"]},
        "trainer": {"models": services["trainer"]["environment"]["HF_HOME"]},
        "prometheus": {"prometheus-data": "/prometheus"},
        "grafana": {"grafana-data": "/var/lib/grafana"},
    }
    assert {volume for service in mounted.values() for volume in service} == declared


def test_servers_listen_on_the_host_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 6
    assert all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in ports)


def test_logs_are_bounded(services: dict[str, Any]) -> None:
    for service in services.values():
        assert {"max-size", "max-file"} == service["logging"]["options"].keys()


def test_the_worker_is_given_time_to_drain(services: dict[str, Any]) -> None:
    number, unit = re.fullmatch(r"(\d+)([sm])", services["worker"]["stop_grace_period"]).groups()  # type: ignore[union-attr]
    drain_s = float(services["worker"]["environment"]["VISIONQ_DRAIN_S"])
    assert drain_s == WorkerSettings.model_fields["drain_s"].default
    assert int(number) * UNIT_S[unit] >= drain_s + 15


@pytest.mark.parametrize(
    ("service", "settings"), [("worker", WorkerSettings), ("trainer", WorkerSettings), ("api", GatewaySettings)]
)
def test_a_service_is_told_only_settings_that_it_has(
    services: dict[str, Any], service: str, settings: type[BaseSettings]
) -> None:
    told = {name for name in services[service]["environment"] if name.startswith(("VISIONQ_", "AWS_"))}
    known = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    for name, setting in settings.model_fields.items():
        alias = setting.validation_alias
        known |= set(map(str, alias.choices)) if isinstance(alias, AliasChoices) else {f"VISIONQ_{name.upper()}"}
    assert told <= known


def test_defaults_are_those_of_the_worker(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"VISIONQ_REDIS_URL", "AWS_ENDPOINT_URL_S3", "VISIONQ_HTTP_HOST", "VISIONQ_HTTP_PORT"}
    plain = WorkerSettings()
    for name in services["worker"]["environment"].keys() - addresses:
        monkeypatch.setenv(name, services["worker"]["environment"][name])
    assert WorkerSettings() == plain


def test_the_workers_probes_are_asked_and_not_published(services: dict[str, Any]) -> None:
    worker = services["worker"]
    port = worker["environment"]["VISIONQ_HTTP_PORT"]
    assert worker["expose"] == [port]
    assert "ports" not in worker
    assert f"{{{port} + number}}/healthz" in worker["healthcheck"]["test"][-1]
    devices = compose.load(*FILES, variables=compose.SECRETS | {"WORKER_DEVICES": "0,1"})["services"]["worker"]
    assert devices["environment"]["WORKER_DEVICES"] == "0,1"
    assert devices["healthcheck"] == worker["healthcheck"]


def test_the_gateway_is_open_to_its_port_only_with_keys(services: dict[str, Any]) -> None:
    environment = {name: value for name, value in services["api"]["environment"].items() if value}
    settings = GatewaySettings.model_validate(
        {name.removeprefix("VISIONQ_").lower(): environment[name] for name in environment}
    )
    assert len(KeyRing.load(settings)) == 1
    check_host(settings, KeyRing.load(settings))
    assert services["api"]["ports"] == [f"127.0.0.1:8000:{settings.api_port}"]
    assert f":{settings.api_port}/readyz" in str(services["api"]["healthcheck"]["test"])


@pytest.mark.parametrize("missing", sorted(compose.SECRETS))
def test_a_missing_secret_is_named(missing: str) -> None:
    given = {name: value for name, value in compose.SECRETS.items() if name != missing}
    with pytest.raises(compose.MissingVariable, match=rf"copy \.env\.example to \.env and set {missing}"):
        compose.load("docker-compose.yml", variables=given)


def test_the_example_names_every_variable_and_holds_no_secret() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    written = dict(line.removeprefix("#").split("=", 1) for line in lines if re.match(r"#?[A-Z0-9_]+=", line))
    assert written.keys() == set().union(*(compose.variables_in((ROOT / name).read_text()) for name in FILES))
    assert {name for name, value in written.items() if not value} >= compose.SECRETS.keys()


def test_no_secret_is_written_down(services: dict[str, Any]) -> None:
    as_written = compose.load("docker-compose.yml")["services"]
    for name, service in as_written.items():
        for variable, value in service.get("environment", {}).items():
            is_switch = value in {"true", "false"}
            if re.search("PASSWORD|SECRET|KEY|AUTH(?!.*_ROLE)|TOKEN|REDIS_URL", variable) and not is_switch:
                assert "${" in value, f"{name}: {variable}"
    assert compose.SECRETS["VALKEY_PASSWORD"] not in str(services["valkey"]["command"])


def test_grafana_shows_and_lets_nobody_log_in(services: dict[str, Any]) -> None:
    environment = services["grafana"]["environment"]
    assert (environment["GF_AUTH_ANONYMOUS_ENABLED"], environment["GF_AUTH_ANONYMOUS_ORG_ROLE"]) == ("true", "Viewer")
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"  # its password would be `admin`
    assert (environment["GF_AUTH_BASIC_ENABLED"], environment["GF_AUTH_DISABLE_LOGIN_FORM"]) == ("false", "true")
    (port,) = services["grafana"]["ports"]
    assert port.startswith("127.0.0.1:")


def test_gpus_are_reserved_and_supervised_only_by_the_override(services: dict[str, Any]) -> None:
    assert "deploy" not in services["worker"]
    worker = compose.load(*FILES, variables=compose.SECRETS)["services"]["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert worker["command"] == [*services["worker"]["command"], "--devices", "0"]
    assert worker["image"] != services["worker"]["image"]
    (argument,) = worker["build"]["args"]
    assert f"ARG {argument}=" in (ROOT / worker["build"]["dockerfile"]).read_text()


def test_images_are_built_from_pinned_packages_and_little_else() -> None:
    for path in DOCKERFILES:
        installs = re.findall(r"pip install .*", (ROOT / path).read_text())
        assert installs
        assert all("-c constraints.txt" in line for line in installs)
        copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / path).read_text(), re.MULTILINE)
        ignored = (ROOT / ".dockerignore").read_text().splitlines()
        assert "*" in ignored
        assert {name for line in copied for name in line.split()} <= {
            line.removeprefix("!") for line in ignored if line.startswith("!")
        }


def test_the_workers_image_has_the_torchvision_of_its_torch() -> None:
    """From PyPI beside a CPU's torch it would not load."""
    installs = re.findall(r"pip install .*", (ROOT / "worker/Dockerfile").read_text())
    assert [set(line.split()) & {"torch", "torchvision"} for line in installs] == [{"torch", "torchvision"}, set()]
    assert "--index-url" in installs[0]
    assert '. "./worker[vision,train]"' in installs[1]


def test_the_gateways_image_carries_no_worker() -> None:
    assert not re.search(r"^COPY .*worker", (ROOT / "api_stub/Dockerfile").read_text(), re.MULTILINE)


def test_the_gpus_image_takes_torch_from_an_index_with_cuda() -> None:
    gpu = compose.load("docker-compose.gpu.yml")["services"]["worker"]["build"]["args"]
    assert gpu == {"TORCH_INDEX_URL": "https://pypi.org/simple"}


def test_the_images_command_is_the_services_command(services: dict[str, Any]) -> None:
    text = (ROOT / services["worker"]["build"]["dockerfile"]).read_text()
    assert f"CMD {json.dumps(services['worker']['command'])}" in text
