"""Log lines as machines and people read them."""

from __future__ import annotations

import json
import logging

from api_stub.contract.log_line import JsonFormatter
from worker.observability.logging import TextFormatter


def record(**facts: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "worker.jobs.pipeline", "levelname": "INFO", "msg": "job started"})
    made.__dict__.update(facts)
    return made


def test_a_json_line_carries_the_phrase_and_the_facts() -> None:
    line = json.loads(JsonFormatter().format(record(action="job", job_id="1234", attempt=2)))
    assert line["message"] == "job started"
    assert (line["action"], line["job_id"], line["attempt"]) == ("job", "1234", 2)
    assert set(line) == {"ts", "level", "logger", "message", "action", "job_id", "attempt"}


def test_an_exception_stays_on_one_json_line() -> None:
    try:
        raise ValueError("broken\nin two")
    except ValueError as error:
        text = JsonFormatter().format(record(exc_info=(ValueError, error, error.__traceback__)))
    assert "\n" not in text
    assert "ValueError" in json.loads(text)["exception"]


def test_a_text_line_shows_the_facts_to_a_person() -> None:
    assert TextFormatter().format(record(job_id="1234")).endswith("INFO    job started job_id=1234")
