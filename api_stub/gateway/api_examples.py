"""What the OpenAPI document shows of each route: what is sent, and what is answered, good and bad."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

_MEDIA: Final = "s3://media/scene.png"
_JOB_ID: Final = "0b8f6a52-6d4e-4c58-9a55-2f2d3a1b7c10"

#: One job of each kind. They are sent to a gateway by the tests.
JOB_EXAMPLES: Final[dict[str, dict[str, Any]]] = {
    "caption": {"task": "visionq.caption", "media": [_MEDIA]},
    "vqa": {
        "task": "visionq.vqa",
        "media": [_MEDIA],
        "question": "What colour is the circle?",
        "sampling": {"max_new_tokens": 32},
    },
    "video_qa": {
        "task": "visionq.video_qa",
        "media": ["s3://media/clip.mp4"],
        "question": "Which way does it move?",
        "num_frames": 8,
        "deadline_s": 120,
    },
    "conversation": {
        "task": "visionq.vqa",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "uri": _MEDIA}, {"type": "text", "text": "What is in the picture?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]},
            {"role": "user", "content": [{"type": "text", "text": "And below it?"}]},
        ],
    },
}

PROMOTE_EXAMPLE: Final = {"checkpoint": "s3://models/mine/checkpoint-1200/"}
CANCEL_EXAMPLE: Final[dict[str, Any]] = {"status": "queued", "model": "default", "metadata": {"run": 7}}
UPLOAD_EXAMPLE: Final = {"content_type": "image/png", "num_bytes": 48213}
#: One event as a reader of server-sent events gets it.
EVENT_EXAMPLE: Final = {
    "id": "3",
    "event": "output.delta",
    "data": (
        f'{{"v":1,"job_id":"{_JOB_ID}","seq":3,"attempt":1,"ts":1790000000.75,"type":"output.delta",'
        '"text":"red","offset":0,"num_tokens":1}'
    ),
}

_QUEUED: Final[dict[str, Any]] = {
    "job_id": _JOB_ID,
    "task": "visionq.vqa",
    "model": "default",
    "status": "queued",
    "cancelling": False,
    "attempt": 0,
    "priority": 6,
    "tenant": "team-a",
    "created_at": 1790000000.25,
    "position": 0,
    "num_workers": 2,
    "urls": {
        "self": f"/v1/jobs/{_JOB_ID}",
        "events": f"/v1/jobs/{_JOB_ID}/events",
        "cancel": f"/v1/jobs/{_JOB_ID}/cancel",
        "retry": f"/v1/jobs/{_JOB_ID}/retry",
    },
}
_DONE: Final[dict[str, Any]] = {name: value for name, value in _QUEUED.items() if name != "position"} | {
    "status": "completed",
    "attempt": 1,
    "started_at": 1790000000.5,
    "finished_at": 1790000001.5,
    "worker": "w1@host:17",
    "result": {
        "job_id": _JOB_ID,
        "task": "visionq.vqa",
        "model": "default",
        "text": "red",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 96, "completion_tokens": 2, "images": 1, "frames": 0},
        "timings": {
            "queued_s": 0.25,
            "fetch_s": 0.125,
            "prepare_s": 0.0625,
            "first_token_s": 0.5,
            "generate_s": 0.5,
            "total_s": 1.25,
        },
        "attempt": 1,
    },
}
_UPLOADED: Final = "s3://media/uploads/1f0e6f0a-7d7c-4c39-8a0b-2b1a0e5c9d11.png"

#: By the name of an answer's schema; a job that was just handed in is `JobReply` with the status 202.
ANSWERS: Final[Mapping[str, dict[str, Any]]] = {
    "JobReply": _DONE,
    "JobReply 202": _QUEUED,
    "JobList": {"jobs": [_QUEUED], "next_cursor": "1790000000.25"},
    "UploadReply": {
        "uri": _UPLOADED,
        "url": "https://s3.example/media/uploads/1f0e6f0a-7d7c-4c39-8a0b-2b1a0e5c9d11.png?X-Amz-Signature=…",
        "method": "PUT",
        "headers": {"Content-Type": "image/png", "Content-Length": "48213"},
        "expires_s": 3600,
    },
    "StoredReply": {
        "uri": "s3://media/uploads/inline/5d41402abc4b2a76/9f86d081884c7d65.png",
        "content_type": "image/png",
    },
    "QueueList": {"queues": [{"model": "default", "depth": 5, "waiting": 3, "num_workers": 2}]},
    "CancelReply": {"cancelled": 12, "cancelling": 2},
    "QueueReply": {"model": "default", "paused": True, "changed": True, "depth": 5, "num_workers": 2},
    "PurgeReply": {"model": "default", "cancelled": 12},
    "ModelReply": {
        "model": "default",
        "number": 1,
        "source": "s3://models/mine/checkpoint-1200/",
        "adapters": {},
        "workers": [{"worker": "visionq-default@host-7", "checkpoint": "3589becd", "source": "demo"}],
    },
    "Health": {"status": "ok"},
}

_PROBLEMS: Final[Mapping[HTTPStatus, tuple[str, str]]] = {
    HTTPStatus.BAD_REQUEST: ("invalid_request", "the body is not JSON"),
    HTTPStatus.UNAUTHORIZED: ("unauthorized", "no key: send `Authorization: Bearer <key>`"),
    HTTPStatus.FORBIDDEN: ("forbidden", "model: this key may not use the model 'large'"),
    HTTPStatus.NOT_FOUND: ("unknown_job", "no job 'x': never submitted, not adopted yet, or its record has expired"),
    HTTPStatus.REQUEST_TIMEOUT: ("request_timeout", "the body did not arrive within 60 s"),
    HTTPStatus.CONFLICT: ("cannot_retry", "job 'x' is not final"),
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: ("too_large", "the body is larger than 67108864 bytes"),
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: ("unsupported_media_type", "send application/json"),
    HTTPStatus.UNPROCESSABLE_ENTITY: ("invalid_request", "question: required"),
    HTTPStatus.TOO_MANY_REQUESTS: ("queue_full", "the queue of 'default' is full: 10000 jobs"),
    HTTPStatus.BAD_GATEWAY: ("storage_unavailable", "S3 refused the object"),
    HTTPStatus.SERVICE_UNAVAILABLE: ("store_unavailable", "Redis does not answer"),
}


def problem_example(status: HTTPStatus) -> dict[str, Any]:
    """Return a problem that comes with a status."""
    code, detail = _PROBLEMS[status]
    problem: dict[str, Any] = {
        "type": f"urn:visionq:problem:{code}",
        "title": status.phrase,
        "status": int(status),
        "detail": detail,
        "code": code,
    }
    if status is HTTPStatus.UNPROCESSABLE_ENTITY:
        problem["errors"] = [{"field": "question", "message": "required"}]
    return problem
