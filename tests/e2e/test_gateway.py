"""A picture in, an answer out, over HTTP alone: gateway, Redis, S3 and a worker with the shipped model."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.scenes import draw
from tests.gateway.service import Service, sent_events, serving, text_of
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server


@pytest.fixture(scope="module")
def gateway(redis_server: RedisServer, s3_server: S3Server, demo_worker: WorkerProcess) -> Iterator[Service]:
    s3_server.client()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        with serving(redis_server.url, s3_server.url) as running:
            yield running


def test_a_drawn_scene_is_answered_truthfully_however_it_was_sent(gateway: Service, tmp_path: Path) -> None:
    drawing = next(drawing for drawing in draw(tmp_path) if str(drawing["path"]).endswith(".png"))
    content = Path(str(drawing["path"])).read_bytes()
    asked = next(asked for asked in drawing["questions"] if asked["task"] == "vqa")  # type: ignore[attr-defined]
    job = {"task": "visionq.vqa", "question": asked["text"]}

    inline = job | {"media": ["data:image/png;base64," + base64.b64encode(content).decode()]}
    waited = gateway.http.post("/v1/jobs", json=inline, headers={"Prefer": "wait=60"}, timeout=90)
    assert (waited.status_code, waited.json()["result"]["text"]) == (200, asked["answer"])

    upload = gateway.http.post("/v1/uploads", json={"content_type": "image/png", "num_bytes": len(content)}).json()
    assert httpx.put(upload["url"], content=content, headers=upload["headers"], timeout=30).status_code == 200
    uploaded = gateway.http.post("/v1/jobs", json=job | {"media": [upload["uri"]]}).json()
    with httpx.stream("GET", gateway.url + uploaded["urls"]["events"], timeout=90) as answer:
        events = list(sent_events(answer.iter_lines()))
    assert events[-1].type == "job.completed"
    assert text_of(events) == asked["answer"]

    form = {"job": json.dumps(job)}
    sent = gateway.http.post("/v1/jobs", data=form, files={"media": ("a.png", content, "image/png")}).json()
    done = gateway.http.get(sent["urls"]["self"], params={"wait": 60}, timeout=90).json()
    assert (done["status"], done["result"]["text"]) == ("completed", asked["answer"])
