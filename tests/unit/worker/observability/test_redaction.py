"""No secret gets past the log's formatters, in whatever dress."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from api_stub.contract.log_line import JsonFormatter
from worker.observability.logging import Redactor, TextFormatter, job_context, job_facts
from worker.settings import WorkerSettings

PASSWORD = 'pa/ss"wörd%1'


@pytest.mark.parametrize(
    "text",
    [
        f"auth failed for {PASSWORD}",
        "redis://:pa%2Fss%22w%C3%B6rd%251@host:6379/0",
        json.dumps({"url": PASSWORD}),
        json.dumps({"url": PASSWORD}, ensure_ascii=False),
        "redis://user:another@host/0",
        "redis://another@host:6379/0",
        "rediss://:another@host/0",
        "cannot reach rediss://another@host, giving up",
        "redis://user:p@another@host/0",
        'Could not connect to the endpoint URL: "http://user:another@s3.local:8333/media/a.png"',
        "https://another@s3.local/media",
        "redis://host:6379/0?db=1&password=another",
        "https://b.s3.amazonaws.com/k?X-Amz-Credential=another%2F2026&X-Amz-Signature=another&x=1",
        "Authorization: Bearer another",
    ],
)
def test_what_is_secret_is_hidden(text: str) -> None:
    hidden = Redactor([PASSWORD])(text)
    assert "***" in hidden
    assert "another" not in hidden
    assert not any(part in hidden for part in ("pa/ss", "pa%2Fss", "rd%1", "rd%251"))


def test_a_url_keeps_all_but_its_credentials() -> None:
    hidden = Redactor()("from redis://secret@host:6379/0 and rediss://user:secret@other/1 to http://u:p@s3.local/media")
    assert hidden == "from redis://***@host:6379/0 and rediss://***@other/1 to http://***@s3.local/media"


@pytest.mark.parametrize(
    "text",
    [
        "s3://media/a.png is empty (0 bytes)",
        "s3://media/b@d.png is no image",
        "https://hub.local/models?who=a@b",
        "16:02:11 INFO job started",
        "a@b: c",
    ],
)
def test_what_is_not_secret_stays(text: str) -> None:
    assert Redactor(["", "abc"])(text) == text


def test_both_formats_hide_secrets_in_messages_facts_and_tracebacks() -> None:
    try:
        raise ValueError(f"bad {PASSWORD}")
    except ValueError as error:
        trouble = (ValueError, error, error.__traceback__)
    record = logging.makeLogRecord({"msg": f"m {PASSWORD}", "fact": PASSWORD, "exc_info": trouble})
    for formatter in (JsonFormatter(Redactor([PASSWORD])), TextFormatter(Redactor([PASSWORD]))):
        line = formatter.format(record)
        assert line.count("***") >= 3
        assert "pa/ss" not in line
    assert json.loads(JsonFormatter(Redactor([PASSWORD])).format(record))["fact"] == "***"


def test_lines_of_a_jobs_thread_carry_its_id_unless_they_name_another() -> None:
    with job_context("one", 2):
        line = json.loads(JsonFormatter(facts=job_facts).format(logging.makeLogRecord({"msg": "x"})))
        other = json.loads(JsonFormatter(facts=job_facts).format(logging.makeLogRecord({"msg": "x", "job_id": "two"})))
    after = json.loads(JsonFormatter(facts=job_facts).format(logging.makeLogRecord({"msg": "x"})))
    assert (line["job_id"], line["attempt"]) == ("one", 2)
    assert other["job_id"] == "two"
    assert "job_id" not in after


def test_the_settings_know_the_secrets_of_their_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    settings = WorkerSettings(redis_url="redis://:pw%25@host/0")  # type: ignore[arg-type]
    assert set(settings.secrets()) == {"pw%25", "hf_x", "test-key", "test-secret"}


LAST_WORDS = """
import threading
from worker.observability.logging import configure_logging
from worker.observability.logging import Redactor
from worker.settings import LogFormat
configure_logging(LogFormat.JSON, "INFO", redact=Redactor(["hunter2hunter2"]))
def end(): raise ValueError("hunter2hunter2")
thread = threading.Thread(target=end, name="doomed"); thread.start(); thread.join()
end()
"""


def test_the_last_words_of_a_thread_and_of_a_process_are_log_lines() -> None:
    done = subprocess.run([sys.executable, "-c", LAST_WORDS], capture_output=True, text=True, timeout=50, check=False)
    thread, process = map(json.loads, done.stderr.splitlines())
    assert (thread["message"], thread["thread_name"]) == ("thread ended by an exception", "doomed")
    assert process["message"] == "process ended by an exception"
    assert "ValueError: ***" in thread["exception"]
    assert "hunter2" not in done.stderr
