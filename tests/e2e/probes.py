"""Asks a worker's probes."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families


def get(port: int, path: str, accept: str = "*/*") -> tuple[int, str]:
    """Return status and body; status 0 when nobody answers."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def probe(port: int, path: str) -> tuple[int, dict[str, Any]]:
    """Return status and report of /healthz or /readyz."""
    status, body = get(port, path)
    return status, json.loads(body) if body else {}


def samples(port: int) -> dict[str, float]:
    """Return what /metrics says: `name{label=value,…}` without the model's name, in the order of the labels' names."""
    status, body = get(port, "/metrics")
    assert status == 200, body
    found = {}
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            assert sample.labels["model_name"] == "default"
            labels = ",".join(f"{n}={v}" for n, v in sorted(sample.labels.items()) if n != "model_name")
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found
