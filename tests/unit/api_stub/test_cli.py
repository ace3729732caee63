"""The `visionq` command in-process: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from click.testing import Result
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from api_stub.cli.errors import visible
from api_stub.cli.flags import JobFlags
from api_stub.cli.main import app
from api_stub.client.client import Client
from api_stub.contract import names
from api_stub.contract.job import CaptionJob, VideoQaJob, VqaJob, parse_job
from api_stub.contract.media import MediaOptions
from api_stub.contract.sampling import SamplingParams
from api_stub.contract.schema import NAMES
from api_stub.ledger.ledger import Ledger
from api_stub.submit import JobOptions
from tests.processes import ctrl_c_is_heard
from tests.servers import S3Server, eventually, free_port
from tests.unit.api_stub.ledger_kit import question
from tests.unit.api_stub.workers import ScriptedWorker

JOB = "job-1"
IMAGE = "s3://media/a.png"
Run = Callable[..., Result]


@pytest.fixture
def run(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `visionq` with these arguments; stdout is a pipe."""
    monkeypatch.setenv("VISIONQ_REDIS_URL", redis_url)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, arguments)


@pytest.fixture
def answered(ledger: Ledger, worker: ScriptedWorker) -> None:
    """JOB is a completed job."""
    ledger.submit(JOB, question())
    worker.answer(JOB, "It is ", "red\x1b[31m")


@pytest.fixture
def failed(ledger: Ledger, worker: ScriptedWorker) -> None:
    """JOB is a failed job."""
    ledger.submit(JOB, question())
    worker.take(JOB)
    worker.say("It")
    worker.fail()


def serve(ledger: Ledger, job_id: str, *pieces: str) -> threading.Thread:
    """Answer a job as soon as it is submitted."""

    def answer() -> None:
        eventually(lambda: ledger.view(job_id), what=f"{job_id} is submitted")
        ScriptedWorker(ledger).answer(job_id, *pieces)

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


def test_an_answer_in_a_pipe_is_the_text_alone(run: Run, ledger: Ledger) -> None:
    ledger.beat("worker-1", "default", [])  # without a worker there would be a warning
    serving = serve(ledger, JOB, "It ", "is ", "réd")
    done = run("vqa", IMAGE, "-q", "What colour is it?", "--job-id", JOB)
    serving.join()
    assert (done.exit_code, done.stdout, done.stderr) == (0, "It is réd\n", "")


def test_every_flag_reaches_the_job(run: Run, ledger: Ledger, redis_client: redis.Redis) -> None:
    flags = (
        "--model", "big", "--max-new-tokens", "9", "--min-new-tokens", "1", "--temperature", "0.5", "--top-p", "0.9",
        "--top-k", "3", "--min-p", "0.1", "--seed", "7", "--repetition-penalty", "1.5", "--stop", "a", "--stop", "b",
        "--min-pixels", "100", "--max-pixels", "900",
        "--deadline", "60", "--priority", "2", "--tenant", "team", "--timeout", "20", "--job-id",
    )  # fmt: skip
    shared = {
        "model": "big", "deadline_s": 60.0, "priority": 2, "tenant": "team",
        "media_options": MediaOptions(min_pixels=100, max_pixels=900),
        "sampling": SamplingParams(max_new_tokens=9, min_new_tokens=1, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1,
                                   seed=7, repetition_penalty=1.5, stop=("a", "b")),
    }  # fmt: skip
    calls = {
        "job-c": (("caption", IMAGE, "-p", "What?"), CaptionJob(media=(IMAGE,), prompt="What?", **shared)),
        "job-v": (("vqa", IMAGE, IMAGE, "-q", "Why?"), VqaJob(media=(IMAGE, IMAGE), question="Why?", **shared)),
        "job-f": (
            ("video-qa", "s3://media/a.mp4", "-q", "Why?", "--frames", "4"),
            VideoQaJob(media=("s3://media/a.mp4",), question="Why?", num_frames=4, **shared),
        ),
    }
    for job_id, (arguments, expected) in calls.items():
        serving = serve(ledger, job_id, "x")
        assert run(*arguments, *flags, job_id).exit_code == 0
        serving.join()
        assert parse_job(redis_client.hget(names.job_key(job_id), "body") or "") == expected


def test_flags_that_are_not_given_leave_the_sampling_to_the_checkpoint(
    run: Run, ledger: Ledger, redis_client: redis.Redis
) -> None:
    serving = serve(ledger, JOB, "x")
    assert run("vqa", "-q", "Why?", "--job-id", JOB).exit_code == 0
    serving.join()
    sampling = parse_job(redis_client.hget(names.job_key(JOB), "body") or "").sampling
    assert (sampling.min_new_tokens, sampling.repetition_penalty, sampling.stop) == (None, None, None)


def test_the_flags_cover_the_options_of_the_python_api() -> None:
    without_flag = {"messages", "sampling", "webhook", "metadata"}
    assert set(JobFlags().options) == set(JobOptions.__annotations__) - without_flag


@pytest.mark.usefixtures("answered")
def test_json_is_the_result_in_one_line(run: Run) -> None:
    done = run("watch", JOB, "--json")
    assert done.exit_code == 0
    [line] = done.stdout.splitlines()
    assert (json.loads(line)["text"], json.loads(line)["job_id"]) == ("It is red\x1b[31m", JOB)


@pytest.mark.usefixtures("failed")
def test_a_failed_job_is_one_line_on_stderr_and_status_1(run: Run) -> None:
    done = run("watch", JOB)
    assert (done.exit_code, done.stdout) == (1, "It")
    assert done.stderr.strip() == "media_not_found: no such object: s3://media/a"


@pytest.mark.usefixtures("failed")
def test_a_failed_job_as_json_is_an_error_object(run: Run) -> None:
    done = run("watch", JOB, "--json")
    error = {"code": "media_not_found", "message": "no such object: s3://media/a", "retryable": False}
    assert (done.exit_code, json.loads(done.stdout), done.stderr) == (1, {"job_id": JOB, "error": error}, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("caption",), "invalid_request: media: a caption needs at least 1 image, got 0"),
        (("vqa", "-q", "Why?", "--priority", "10"), "invalid_request: priority: "),
        (("vqa", "http://host/a.png", "-q", "Why?"), "invalid_request: media.0: media must be an s3:// URI"),
        (("caption", "missing.png"), "invalid_request: missing.png: No such file or directory"),
        (("vqa",), "Missing option '--question'"),
        (("vqa", "-q", "Why?", "--top-k", "many"), "Invalid value for '--top-k'"),
        (("watch", "nobody"), "unknown_job: no job 'nobody'"),
        (("status", "nobody"), "unknown_job: no job 'nobody'"),
        (("cancel", "nobody"), "unknown_job: no job 'nobody'"),
        (("dance",), "No such command 'dance'"),
    ],
)
def test_wrong_usage_is_told_and_has_status_2(run: Run, arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr


def test_wrong_usage_as_json_is_an_error_object(run: Run) -> None:
    done = run("vqa", "-q", "Why?", "--priority", "10", "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["code"] == "invalid_request"


def test_a_bad_setting_names_its_variable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONQ_LEASE_S", "soon")
    done = run("status", JOB)
    assert done.exit_code == 2
    assert done.stderr.startswith("invalid_settings: VISIONQ_LEASE_S: ")


@pytest.mark.parametrize("arguments", [("vqa", "-q", "Why?"), ("watch", JOB), ("status", JOB), ("cancel", JOB)])
def test_a_redis_that_is_down_has_status_3(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("VISIONQ_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr.startswith("store_unavailable: ")


def test_a_full_queue_has_status_3(run: Run, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONQ_MAX_QUEUED", "1")
    client.vqa(question="Why?")
    done = run("vqa", "-q", "Why?")
    assert done.exit_code == 3
    assert done.stderr.startswith("queue_full: ")


def test_a_timeout_has_status_4_and_names_the_job(run: Run) -> None:
    done = run("vqa", "-q", "Why?", "--job-id", JOB, "--timeout", "0.2")
    assert done.exit_code == 4
    assert f"job {JOB} goes on" in done.stderr
    assert run("status", JOB).stdout.startswith(f"{JOB}: queued\n")


def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(run: Run, ledger: Ledger, worker: ScriptedWorker) -> None:
    ledger.submit(JOB, question())
    worker.take(JOB)
    others = {client["id"] for client in ledger.client.client_list()}

    def commands() -> set[str]:
        return {client["cmd"] for client in ledger.client.client_list() if client["id"] not in others}

    def interrupt() -> None:
        # Subscribed and caught up: in the middle of a connect, redis-py would leave its socket open.
        eventually(lambda: {"subscribe", "evalsha"} <= commands())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with ctrl_c_is_heard():
        done = run("watch", JOB)
        thread.join()
    assert done.exit_code == 130
    assert f"job {JOB} goes on: `visionq watch {JOB}` or `visionq cancel {JOB}`" in done.stderr
    view = ledger.view(JOB)
    assert view is not None
    assert (view.status, view.cancelling) == ("in_progress", False)


def test_a_restarted_stream_in_a_pipe_fails_because_it_cannot_be_taken_back(
    run: Run, ledger: Ledger, worker: ScriptedWorker
) -> None:
    ledger.submit(JOB, question())
    worker.take(JOB)
    worker.say("Blue")
    worker.give_back()
    worker.answer(JOB, "Red")
    done = run("watch", JOB)
    assert (done.exit_code, done.stdout) == (1, "Blue")
    assert done.stderr.startswith("stream_restarted: ")
    assert json.loads(run("watch", JOB, "--json").stdout)["text"] == "Red"


@pytest.mark.usefixtures("answered")
def test_status_and_cancel_of_a_completed_job(run: Run) -> None:
    done = run("status", JOB)
    assert done.stdout.startswith(f"{JOB}: completed\nmodel default, served by 0 workers, priority 6\n")
    assert "It is red␛[31m" in done.stdout
    assert json.loads(run("status", JOB, "--json").stdout)["status"] == "completed"
    assert run("cancel", JOB).stdout == "had ended before\n"
    assert json.loads(run("cancel", JOB, "--json").stdout) == {"job_id": JOB, "cancel": "final"}


@pytest.mark.usefixtures("failed")
def test_status_of_a_failed_job_shows_its_error(run: Run) -> None:
    assert "media_not_found: no such object: s3://media/a" in run("status", JOB).stdout


def test_cancel_ends_a_queued_job(run: Run, ledger: Ledger) -> None:
    ledger.submit(JOB, question())
    assert run("cancel", JOB).stdout == "cancelled\n"
    assert run("watch", JOB).exit_code == 1


@pytest.mark.usefixtures("s3_client")
def test_a_local_file_is_uploaded_first(
    run: Run, ledger: Ledger, redis_client: redis.Redis, s3_server: S3Server, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.url)
    (tmp_path / "cat.jpg").write_bytes(b"jpeg")
    serving = serve(ledger, JOB, "a cat")
    done = run("caption", str(tmp_path / "cat.jpg"), IMAGE, "--job-id", JOB)
    serving.join()
    assert (done.exit_code, done.stdout) == (0, "a cat\n")
    job = parse_job(redis_client.hget(names.job_key(JOB), "body") or "")
    assert job.media[0].startswith("s3://media/uploads/")
    assert job.media[1] == IMAGE
    uploaded = run("upload", str(tmp_path / "cat.jpg"), "--json")
    assert json.loads(uploaded.stdout)["uri"].startswith("s3://media/uploads/")
    assert run("upload", str(tmp_path / "cat.jpg")).stdout.startswith("s3://media/uploads/")


def test_upload_of_a_missing_file_or_to_a_missing_storage(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    (tmp_path / "cat.jpg").write_bytes(b"jpeg")
    assert run("upload", str(tmp_path / "none.jpg")).exit_code == 2
    assert run("upload", str(tmp_path / "cat.jpg")).exit_code == 3


def test_schemas_are_exported_to_stdout_or_to_files(run: Run, tmp_path: Path) -> None:
    printed = json.loads(run("schema").stdout)
    assert set(printed) == set(NAMES)
    assert run("schema", "--out", str(tmp_path / "new" / "folder")).exit_code == 0
    for name in NAMES:
        body = json.loads((tmp_path / "new" / "folder" / f"{name}.schema.json").read_text("utf-8"))
        assert body == printed[name]
        Draft202012Validator.check_schema(body)


def test_the_asyncapi_document_is_exported(run: Run, tmp_path: Path) -> None:
    printed = json.loads(run("schema", "--asyncapi").stdout)
    assert printed["asyncapi"] == "3.0.0"
    assert run("schema", "--asyncapi", "--out", str(tmp_path / "new")).exit_code == 0
    assert json.loads((tmp_path / "new" / "asyncapi.json").read_text("utf-8")) == printed


def test_control_characters_become_visible() -> None:
    assert visible("a\x1b[31m\r\x07\x9b\x7fé\n\tb") == "a␛[31m␍␇��é\n\tb"
