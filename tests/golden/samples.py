"""One value of every kind that crosses a boundary; their canonical JSON lies beside this file.

`python -m tests.golden.samples` writes the files again: do that only for a wanted change of the wire format.
"""

from __future__ import annotations

from pathlib import Path

from api_stub.contract.conversation import ImagePart, Message, Role, TextPart, VideoPart
from api_stub.contract.error import ErrorCode, ErrorDetail, ErrorInfo
from api_stub.contract.event import (
    Event,
    JobCancelled,
    JobCompleted,
    JobExpired,
    JobFailedEvent,
    JobProgress,
    JobQueued,
    JobRetrying,
    JobStarted,
    OutputDelta,
    RetryReason,
    Stage,
    StreamGap,
)
from api_stub.contract.finetune import FinetuneMethod, FinetuneOptions, FinetuneRecipe
from api_stub.contract.job import CaptionJob, FinetuneJob, Job, TaskName, VideoQaJob, VqaJob, Webhook
from api_stub.contract.result import FinishReason, Result, Timings, Usage
from api_stub.contract.sampling import SamplingParams
from api_stub.contract.status import JobStatus
from api_stub.contract.view import JobView, unserved
from api_stub.contract.wire import WireModel

DIRECTORY = Path(__file__).parent
JOB_ID = "0b8f6a52-6d4e-4c58-9a55-2f2d3a1b7c10"
TS = 1_790_000_000.25
USAGE = Usage(prompt_tokens=96, completion_tokens=7, images=1)
RESULT = Result(
    job_id=JOB_ID,
    task=TaskName.VQA,
    model="default",
    text="The circle is red — “rouge”.",
    finish_reason=FinishReason.STOP,
    usage=USAGE,
    timings=Timings(queued_s=0.25, fetch_s=0.125, prepare_s=0.0625, first_token_s=0.5, generate_s=0.75, total_s=1.1875),
    attempt=1,
    metadata={"order": 7, "tags": ["a", None]},
)
FAILURE = ErrorInfo.of(ErrorCode.MEDIA_NOT_FOUND, "no such object: s3://media/gone.png")
FINETUNED = Result(
    job_id=JOB_ID,
    task=TaskName.FINETUNE,
    model="training",
    text="",
    finish_reason=FinishReason.STOP,
    usage=Usage(),
    timings=Timings(queued_s=0.25, generate_s=840.5, total_s=841.0),
    attempt=2,
    output_uri="s3://media/training/team-a/colours/",
    checkpoint="5f" * 32,
    metrics={"loss": 0.125, "wer": 0.0625},
    steps=250,
)
BROKEN_DATA = ErrorInfo(
    code=ErrorCode.INVALID_REQUEST,
    message="dataset: 2 findings, the first: metadata.jsonl:7: text: empty",
    retryable=False,
    details=(
        ErrorDetail(file="metadata.jsonl", line=7, message="text: empty"),
        ErrorDetail(file="scene 9.png", message="no such object"),
    ),
)
CANCELLATION = ErrorInfo.of(ErrorCode.CANCELLED, "cancelled by the producer")
EXPIRY = ErrorInfo.of(ErrorCode.EXPIRED, "deadline of 30 s passed in the queue")

JOBS: dict[str, Job] = {
    "job_caption": CaptionJob(media=("s3://media/scene.png", "s3://media/b%20c.png?versionId=v1")),
    "job_vqa": VqaJob(
        media=("s3://media/scene.png",),
        question="What colour is the circle?",
        model="smolvlm-2b",
        sampling=SamplingParams(
            max_new_tokens=32,
            min_new_tokens=1,
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            min_p=0.05,
            seed=7,
            repetition_penalty=1.1,
            stop=("\n\n", "END"),
        ),
        deadline_s=30.0,
        priority=3,
        tenant="team-a",
        webhook=Webhook.model_validate({"url": "https://example.com/hook"}),
        metadata={"order": 7, "tags": ["a", None]},
    ),
    "job_video_qa": VideoQaJob(media=("s3://media/clip.mp4",), question="What moves where?", num_frames=16),
    "job_messages": VideoQaJob(
        messages=(
            Message(role=Role.SYSTEM, content=(TextPart(text="Be brief."),)),
            Message(
                role=Role.USER,
                content=(
                    ImagePart(uri="s3://media/scene.png"),
                    TextPart(text="Is it in the clip?"),
                    VideoPart(uri="s3://media/clip.mp4", num_frames=4),
                ),
            ),
            Message(role=Role.ASSISTANT, content=(TextPart(text="The answer is"),)),
        ),
    ),
    "job_finetune": FinetuneJob(
        base="default",
        dataset="s3://media/colours/",
        output="s3://media/training/team-a/colours/",
        method=FinetuneMethod.LORA,
        recipe=FinetuneRecipe.CHAT,
        options=FinetuneOptions(max_steps=250, learning_rate=1e-3, batch_size=24, seed=7, lora_rank=16),
        deadline_s=3600.0,
        tenant="team-a",
    ),
}

EVENTS: dict[str, Event] = {
    "event_queued": JobQueued(job_id=JOB_ID, seq=1, attempt=0, ts=TS, model="default", priority=6),
    "event_started": JobStarted(job_id=JOB_ID, seq=2, attempt=1, ts=TS, worker="w1@host:17", model="default"),
    "event_progress": JobProgress(job_id=JOB_ID, seq=3, attempt=1, ts=TS, stage=Stage.FETCHING, done=1, total=2),
    "event_training": JobProgress(
        job_id=JOB_ID,
        seq=3,
        attempt=1,
        ts=TS,
        stage=Stage.TRAINING,
        done=50,
        total=250,
        metrics={"loss": 1.5, "learning_rate": 0.001, "examples_per_s": 12.5, "eta_s": 400.0},
    ),
    "event_finetuned": JobCompleted(job_id=JOB_ID, seq=9, attempt=2, ts=TS, result=FINETUNED),
    "event_delta": OutputDelta(job_id=JOB_ID, seq=4, attempt=1, ts=TS, text=" röt 🟥", offset=3, num_tokens=2),
    "event_retrying": JobRetrying(job_id=JOB_ID, seq=5, attempt=1, ts=TS, reason=RetryReason.LOST),
    "event_completed": JobCompleted(job_id=JOB_ID, seq=6, attempt=1, ts=TS, result=RESULT),
    "event_failed": JobFailedEvent(
        job_id=JOB_ID, seq=6, attempt=1, ts=TS, error=FAILURE, partial_text="The", usage=USAGE
    ),
    "event_cancelled": JobCancelled(job_id=JOB_ID, seq=2, attempt=0, ts=TS, error=CANCELLATION),
    "event_expired": JobExpired(job_id=JOB_ID, seq=2, attempt=0, ts=TS, error=EXPIRY),
    "event_gap": StreamGap.model_validate(
        {"type": "stream.gap", "job_id": JOB_ID, "seq": 9, "attempt": 1, "ts": TS, "from": 5, "to": 8}
    ),
}

OTHERS: dict[str, WireModel] = {
    "result": RESULT,
    "result_finetune": FINETUNED,
    "error": FAILURE,
    "error_details": BROKEN_DATA,
    "view_queued": JobView(
        job_id=JOB_ID, task=TaskName.VQA, model="default", status=JobStatus.QUEUED, priority=6, created_at=TS
    ),
    "view_unserved": JobView(
        job_id=JOB_ID,
        task=TaskName.VQA,
        model="default",
        status=JobStatus.QUEUED,
        priority=6,
        created_at=TS,
        warnings=(unserved("default"),),
    ),
    "error_no_worker": ErrorInfo.of(
        ErrorCode.NO_WORKER, "no worker has served the model 'default' for 30 s (VISIONQ_API_NO_WORKER_S)"
    ),
    "view_completed": JobView(
        job_id=JOB_ID,
        task=TaskName.VQA,
        model="default",
        status=JobStatus.COMPLETED,
        attempt=1,
        priority=6,
        tenant="team-a",
        created_at=TS,
        started_at=TS + 0.25,
        finished_at=TS + 1.25,
        num_workers=2,
        worker="w1@host:17",
        result=RESULT,
    ),
    "view_failed": JobView(
        job_id=JOB_ID,
        task=TaskName.VQA,
        model="default",
        status=JobStatus.FAILED,
        attempt=1,
        priority=6,
        created_at=TS,
        finished_at=TS + 1.25,
        error=FAILURE,
        partial_text="The",
        usage=USAGE,
    ),
}

SAMPLES: dict[str, WireModel] = {**JOBS, **EVENTS, **OTHERS}


def golden_file(name: str) -> Path:
    """Where the canonical JSON of a sample lies."""
    return DIRECTORY / f"{name}.json"


def main() -> None:
    """Write every golden file."""
    for name, sample in SAMPLES.items():
        golden_file(name).write_text(sample.to_json() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
