"""A job that uses nothing new is the same job in both releases: its JSON, its digest, its row."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import pytest

from api_stub.client.client import Client
from api_stub.contract.job import digest, parse_job
from api_stub.contract.sampling import NEUTRAL
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.lua import Transition, script
from api_stub.ledger.rows import JobConflict, Submission
from api_stub.ledger.settings import LedgerConfig
from tests.compat.earlier import FOLDER, Earlier

IMAGE, CLIP = "s3://media/a%20b.png", "s3://media/clip.mp4?versionId=7"
TURNS = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image", "uri": IMAGE}, {"type": "text", "text": "Why? — ü 🎈"}]},
]
#: Every field that 0.1.0 knows, alone and beside others; `sampling` leaves out what has a default in a checkpoint.
JOBS: tuple[dict[str, Any], ...] = (
    {"task": "visionq.caption", "media": [IMAGE]},
    {"task": "visionq.caption", "media": [IMAGE, IMAGE], "prompt": "What is it?", "priority": 0, "tenant": "zoo"},
    {"task": "visionq.vqa", "question": "Why?"},
    {
        "task": "visionq.vqa",
        "question": "Why?",
        "sampling": {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
    },
    {"task": "visionq.vqa", "messages": TURNS, "deadline_s": 30.5, "metadata": {"b": [1, 2.5, None], "a": "ü"}},
    {"task": "visionq.vqa", "question": "Why?", "webhook": {"url": "https://example.org/hook?x=1"}},
    {"task": "visionq.vqa", "question": "Why?", "webhook": {"url": "https://example.org", "events": ["job.started"]}},
    {"task": "visionq.video_qa", "media": [CLIP, IMAGE], "question": "What moves?", "num_frames": 4, "model": "clips"},
    {
        "task": "visionq.video_qa",
        "media": [CLIP],
        "question": "What moves?",
        "sampling": {"max_new_tokens": 9, "seed": 3},
    },
)
#: With values for which a checkpoint may have a default, other than the neutral ones.
SAMPLED: tuple[dict[str, Any], ...] = (
    {"task": "visionq.vqa", "question": "Why?", "sampling": {"stop": ["\n", "."]}},
    {"task": "visionq.vqa", "question": "Why?", "sampling": {"repetition_penalty": 1.3}},
    {"task": "visionq.vqa", "question": "Why?", "sampling": {"min_new_tokens": 3, "stop": ["."]}},
    {
        "task": "visionq.vqa",
        "question": "Why?",
        "sampling": {"min_new_tokens": 3, "stop": ["."], "repetition_penalty": 2},
    },
)


def written_by(earlier: Earlier, fields: dict[str, Any], job_id: str) -> tuple[str, str, str]:
    """What the last release makes of a job: its JSON, the resolved JSON of its row, the row's digest."""
    code = """
        made = job.parse_job(fields)
        row = made.resolved(job_id)
        answer = [made.to_json(), row.to_json(), job.digest(row)]
    """
    made, row, mark = earlier(code, fields=fields, job_id=job_id)
    return made, row, mark


@pytest.mark.parametrize("fields", JOBS + SAMPLED)
def test_a_job_has_the_digest_that_the_last_release_gives_it(earlier: Earlier, fields: dict[str, Any]) -> None:
    _, row, mark = written_by(earlier, fields, "a")
    assert mark == hashlib.sha256(row.encode()).hexdigest()
    assert digest(parse_job(fields).resolved("a")) == mark


@pytest.mark.parametrize("fields", JOBS + SAMPLED)
def test_the_json_that_the_last_release_writes_is_the_same_job(earlier: Earlier, fields: dict[str, Any]) -> None:
    """It writes neutral values for absent fields: to gateways unresolved, in rows resolved."""
    made, row, mark = written_by(earlier, fields, "a")
    for text in (made, row):
        ours = parse_job(text).resolved("a")
        assert ours.to_json() == row
        assert digest(ours) == mark


@pytest.mark.parametrize("fields", JOBS + SAMPLED)
def test_but_for_absent_neutral_values_a_jobs_json_is_what_it_was(earlier: Earlier, fields: dict[str, Any]) -> None:
    made, _, _ = written_by(earlier, fields, "a")
    ours = parse_job(fields)
    absent = {name: value for name, value in NEUTRAL.items() if getattr(ours.sampling, name) is None}
    filled = ours.model_copy(update={"sampling": ours.sampling.model_copy(update=absent)})
    assert filled.to_json() == made


@pytest.mark.parametrize("fields", JOBS + SAMPLED)
def test_the_last_release_reads_our_json_as_the_same_job(earlier: Earlier, fields: dict[str, Any]) -> None:
    text = parse_job(fields).resolved("a").to_json()
    _, row, mark = written_by(earlier, fields, "a")
    read = earlier("[job.parse_job(text).to_json(), job.digest(job.parse_job(text))]", text=text)
    assert read == [row, mark]


@pytest.mark.parametrize("fields", JOBS + SAMPLED)
def test_one_id_and_body_from_both_releases_is_one_job(
    earlier: Earlier, ledger: Ledger, fields: dict[str, Any]
) -> None:
    job, submit = parse_job(fields), "ledger.submit(job_id, job.parse_job(text)).value"
    made, _, _ = written_by(earlier, fields, "a")
    earlier(submit, job_id="a", text=made)
    assert ledger.submit("a", job) is not Submission.CREATED
    assert ledger.submit("a", parse_job(made)) is not Submission.CREATED  # through a gateway
    ledger.submit("b", job)
    assert earlier(submit, job_id="b", text=made) in ("same", "held")
    with pytest.raises(JobConflict):
        ledger.submit("a", parse_job(fields | {"metadata": {"other": 1}}))


@pytest.mark.parametrize("field", NEUTRAL)
def test_a_neutral_value_that_was_given_to_the_last_release_is_the_same_job_after_an_upgrade(
    earlier: Earlier, ledger: Ledger, field: str
) -> None:
    fields = {"task": "visionq.vqa", "question": "Why?"}
    given = parse_job(fields | {"sampling": {field: NEUTRAL[field]}})
    earlier('ledger.submit("a", job.parse_job(text)).value', text=given.to_json())
    assert ledger.submit("a", given) is Submission.SAME
    with pytest.raises(JobConflict):
        ledger.submit("a", parse_job(fields | {"sampling": {field: NEUTRAL[field], "seed": 1}}))
    ledger.submit("b", parse_job(fields))
    with pytest.raises(JobConflict):
        ledger.submit("b", given)


def test_a_job_handed_in_by_one_release_is_retried_by_the_other(earlier: Earlier, redis_url: str) -> None:
    with Client(redis_url) as client:
        first = earlier('client.vqa(question="Why?", job_id="a").id')
        client.job(first).cancel()
        second = client.retry(first).id
        earlier("client.job(second).cancel()", second=second)
        third = earlier("client.retry(second).id", second=second)
        assert earlier("client.retry(second).id", second=second) == client.retry(second).id == third
        assert client.job(third).status().status == earlier("client.job(third).status().status.value", third=third)


CALLS = {
    "producer": (Transition.SUBMIT, Transition.CANCEL, Transition.RETRY, Transition.REPLAY, Transition.VIEW),
    "gateway": (Transition.LIST_JOBS, Transition.REAP, Transition.TAKE_DELIVERIES, Transition.SETTLE_DELIVERY),
    "worker": (
        *(Transition.CLAIM, Transition.BEAT, Transition.LEAVE, Transition.PUBLISH, Transition.FINISH),
        *(Transition.GIVE_BACK, Transition.RING_AGAIN, Transition.REAP),
    ),
}


@pytest.mark.parametrize("role", CALLS)
def test_the_redis_users_of_the_last_release_may_do_all_that_our_scripts_do(role: str) -> None:
    """Operators copy that file once; a sweep that Redis refuses would find no lost job any more."""
    users = (FOLDER / "redis-users-0.1.0.conf").read_text()
    (line,) = (line for line in users.splitlines() if line.startswith(f"user visionq-{role} "))
    allowed = {word[1:] for word in line.split() if word.startswith("+")}
    for transition in CALLS[role]:
        used = {name.lower() for name in re.findall(r"redis\.p?call\('([A-Z]+)'", script(transition, LedgerConfig()))}
        assert used <= allowed, transition
