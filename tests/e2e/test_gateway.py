"""Every documented route over HTTP alone: gateway, Redis, S3 and a worker with the shipped model."""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.scenes import draw
from tests.gateway.service import Service, sent_events, serving, text_of
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server, eventually

CHAT = "/v1/chat/completions"
#: Nobody serves it: its jobs wait until they are cancelled.
UNSERVED = "nobody"
WAIT_S = 60.0


@dataclass(frozen=True)
class Picture:
    """A drawn picture, what to ask about it, and the true answer."""

    content: bytes
    question: str
    answer: str

    @property
    def data_url(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.content).decode()

    def job(self, uri: str) -> dict[str, Any]:
        return {"task": "visionq.vqa", "question": self.question, "media": [uri]}

    def chat(self, **options: object) -> dict[str, Any]:
        image = {"type": "image_url", "image_url": {"url": self.data_url}}
        content = [image, {"type": "text", "text": self.question}]
        return {"model": "default", "messages": [{"role": "user", "content": content}]} | options


class Caller:
    """Asks, insists on a good answer, and keeps which of the documented routes gave one."""

    def __init__(self, url: str) -> None:
        self.answered: set[tuple[str, str]] = set()
        self._http = httpx.Client(base_url=url, timeout=WAIT_S + 30)
        paths = self.json("GET", "/openapi.json")["paths"]
        self.documented = {(method.upper(), path) for path, routes in paths.items() for method in routes}

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = self._http.request(method, path, **options)
        assert answer.is_success, (method, path, answer.status_code, answer.text)
        if path != "/openapi.json":
            self.answered.add(self._route(method, path))
        return answer

    def json(self, method: str, path: str, **options: Any) -> Any:
        return self(method, path, **options).json()

    def close(self) -> None:
        self._http.close()

    def _route(self, method: str, path: str) -> tuple[str, str]:
        """Find the documented route; one that is written out goes before one with a place for an id."""
        fitting = [
            route
            for route in self.documented
            if route[0] == method and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", route[1]), path)
        ]
        assert fitting, f"{method} {path} is not documented"
        return min(fitting, key=lambda route: route[1].count("{"))


@pytest.fixture(scope="module")
def gateway(redis_server: RedisServer, s3_server: S3Server, demo_worker: WorkerProcess) -> Iterator[Service]:
    s3_server.client()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        with serving(redis_server.url, s3_server.url, api_models=f"default,{UNSERVED}") as running:
            yield running


@pytest.fixture
def call(gateway: Service) -> Iterator[Caller]:
    caller = Caller(gateway.url)
    yield caller
    caller.close()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Picture:
    drawings: list[dict[str, Any]] = draw(tmp_path_factory.mktemp("drawn"))  # type: ignore[assignment]
    drawing = next(drawing for drawing in drawings if str(drawing["path"]).endswith(".png"))
    asked = next(asked for asked in drawing["questions"] if asked["task"] == "vqa" and "colour" in asked["text"])
    return Picture(Path(drawing["path"]).read_bytes(), asked["text"], asked["answer"])


def test_a_drawn_scene_is_answered_truthfully_however_it_was_sent(gateway: Service, picture: Picture) -> None:
    waiting = {"Prefer": f"wait={WAIT_S:g}"}
    inline = picture.job(picture.data_url)
    waited = gateway.http.post("/v1/jobs", json=inline, headers=waiting, timeout=WAIT_S + 30)
    assert (waited.status_code, waited.json()["result"]["text"]) == (200, picture.answer)

    form = {"job": json.dumps({name: value for name, value in inline.items() if name != "media"})}
    file = {"media": ("a.png", picture.content, "image/png")}
    sent = gateway.http.post("/v1/jobs", data=form, files=file, headers=waiting, timeout=WAIT_S + 30)
    assert (sent.status_code, sent.json()["result"]["text"]) == (200, picture.answer)


def test_every_documented_route_gives_a_good_answer(call: Caller, picture: Picture) -> None:
    ask_operations(call)
    done = ask_jobs(call, picture, *ask_uploads(call, picture))
    ask_endings(call, done)
    ask_operator(call, done)
    ask_chat(call, picture)
    ask_batches(call, picture)
    assert call.answered == call.documented


def ask_operations(call: Caller) -> None:
    assert call.json("GET", "/healthz") == call.json("GET", "/readyz") == {"status": "ok"}
    assert any(q["model"] == "default" and q["num_workers"] for q in call.json("GET", "/v1/queues")["queues"])
    assert "default" in [model["id"] for model in call.json("GET", "/v1/models")["data"]]
    assert call.json("GET", "/v1/models/default")["id"] == "default"
    assert "visionq_" in call("GET", "/metrics").text


def ask_uploads(call: Caller, picture: Picture) -> tuple[str, str]:
    """Upload the picture in both ways; return both addresses."""
    wanted = {"content_type": "image/png", "num_bytes": len(picture.content)}
    leave = call.json("POST", "/v1/uploads", json=wanted)
    httpx.put(leave["url"], content=picture.content, headers=leave["headers"], timeout=30).raise_for_status()
    stored = call.json("POST", "/v1/uploads/inline", files={"file": ("a.png", picture.content, "image/png")})
    return leave["uri"], stored["uri"]


def ask_jobs(call: Caller, picture: Picture, uri: str, other_uri: str) -> str:
    """Have the picture looked at in two jobs; return the id of one."""
    job_id = call.json("POST", "/v1/jobs", json=picture.job(uri))["job_id"]
    named = str(uuid.uuid4())
    assert call.json("PUT", f"/v1/jobs/{named}", json=picture.job(other_uri))["job_id"] == named
    for one in (job_id, named):
        events = list(sent_events(iter(call("GET", f"/v1/jobs/{one}/events").text.splitlines())))
        assert (events[-1].type, text_of(events)) == ("job.completed", picture.answer)
        seen = call.json("GET", f"/v1/jobs/{one}", params={"wait": WAIT_S})
        assert (seen["status"], seen["result"]["text"]) == ("completed", picture.answer)
    listed = [job["job_id"] for job in call.json("GET", "/v1/jobs", params={"status": "completed"})["jobs"]]
    assert {job_id, named} <= set(listed)
    return job_id


def ask_endings(call: Caller, done: str) -> None:
    """Repeat a job that is done, and cancel one that waits."""
    again = call.json("POST", f"/v1/jobs/{done}/retry")["job_id"]
    first, second = (call.json("GET", f"/v1/jobs/{one}", params={"wait": WAIT_S}) for one in (done, again))
    assert again != done
    assert first["result"]["text"] == second["result"]["text"]
    waiting = call.json("POST", "/v1/jobs", json={"task": "visionq.vqa", "question": "Why?", "model": UNSERVED})
    assert call.json("POST", f"/v1/jobs/{waiting['job_id']}/cancel")["status"] == "cancelled"


def ask_operator(call: Caller, done: str) -> None:
    """Stop a queue, empty it in two ways, let it go on, and put a job away that is done."""

    def submit(**fields: object) -> str:
        job = {"task": "visionq.vqa", "question": "Why?", "model": UNSERVED} | fields
        return str(call.json("POST", "/v1/jobs", json=job)["job_id"])

    def paused() -> list[str]:
        return [queue["model"] for queue in call.json("GET", "/v1/queues")["queues"] if queue.get("paused")]

    call("POST", f"/v1/queues/{UNSERVED}/pause")
    eventually(lambda: paused() == [UNSERVED], 10, "the queue is shown as paused")
    named, other = submit(metadata={"night": 1}), submit()
    call("POST", "/v1/jobs/cancel", json={"metadata": {"night": 1}})
    assert call.json("GET", f"/v1/jobs/{named}")["status"] == "cancelled"
    assert call.json("GET", f"/v1/jobs/{other}")["status"] == "queued"
    call("POST", f"/v1/queues/{UNSERVED}/purge")
    assert call.json("GET", f"/v1/jobs/{other}")["status"] == "cancelled"
    call("POST", f"/v1/queues/{UNSERVED}/resume")
    call("POST", "/v1/models/default/promote", json={"checkpoint": "demo"})
    call("POST", "/v1/models/default/rollback")
    call("DELETE", f"/v1/jobs/{done}")
    assert done not in [job["job_id"] for job in call.json("GET", "/v1/jobs")["jobs"]]


def ask_chat(call: Caller, picture: Picture) -> None:
    whole = call.json("POST", CHAT, json=picture.chat())
    assert whole["choices"][0]["message"]["content"] == picture.answer
    lines = call("POST", CHAT, json=picture.chat(stream=True)).text.split("\n\n")
    sent = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert sent[-1] == "[DONE]"
    deltas = [choice["delta"] for line in sent[:-1] for choice in json.loads(line)["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == picture.answer


def ask_batches(call: Caller, picture: Picture) -> None:
    """Have one batch answered and one cancelled, and put the files away."""
    file_id = upload(call, picture.chat())
    assert file_id in [file["id"] for file in call.json("GET", "/v1/files")["data"]]
    assert call.json("GET", f"/v1/files/{file_id}")["purpose"] == "batch"
    batch = ended(call, start(call, file_id))
    assert batch["status"] == "completed"
    answer = json.loads(call("GET", f"/v1/files/{batch['output_file_id']}/content").text)
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == picture.answer
    assert call.json("DELETE", f"/v1/files/{file_id}")["deleted"]

    stuck = start(call, upload(call, picture.chat(model=UNSERVED)))
    assert call.json("POST", f"/v1/batches/{stuck}/cancel")["status"] in {"cancelling", "cancelled"}
    assert ended(call, stuck)["status"] == "cancelled"
    assert {stuck, batch["id"]} <= {one["id"] for one in call.json("GET", "/v1/batches")["data"]}


def upload(call: Caller, body: dict[str, Any]) -> str:
    line = json.dumps({"custom_id": "one", "method": "POST", "url": CHAT, "body": body})
    stored = call.json("POST", "/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", line.encode())})
    return str(stored["id"])


def start(call: Caller, file_id: str) -> str:
    order = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    return str(call.json("POST", "/v1/batches", json=order)["id"])


def ended(call: Caller, batch_id: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def look() -> bool:
        found.update(call.json("GET", f"/v1/batches/{batch_id}"))
        return found["status"] in {"completed", "failed", "expired", "cancelled"}

    eventually(look, WAIT_S, "the batch ends")
    return found
