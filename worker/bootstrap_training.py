"""The composition root of a process that trains; apart, because serving needs none of what training imports."""

from __future__ import annotations

from pathlib import Path

from api_stub.contract.finetune import FinetuneJob, FinetuneResult
from worker.bootstrap import REDIS_TIMEOUT_S, connect, heartbeat, make_known, name_of_worker
from worker.jobs.attempt import Attempts
from worker.jobs.circuit import Circuit
from worker.jobs.claim import Claimer
from worker.jobs.finetuning import FinetunePipeline
from worker.jobs.metering import JobMeter
from worker.jobs.training_places import TrainingPlaces
from worker.lifecycle.consumption import Consumption
from worker.lifecycle.drain import Drain
from worker.lifecycle.health import Health
from worker.lifecycle.trainer import TrainerProcess
from worker.media.collect import remove_leftovers
from worker.observability.metrics import Metrics
from worker.settings import WorkerSettings
from worker.streaming.publisher import Publisher
from worker.streaming.token_meter import TokenMeter
from worker.training.progress import AskStop, ReportCommit, ReportProgress
from worker.training.run import Places, finetune


def build_trainer(
    settings: WorkerSettings, metrics: Metrics | None = None, health: Health | None = None
) -> TrainerProcess:
    """Connect a process that takes fine-tuning jobs and serves no model. Raises CannotStart."""
    places, settings = TrainingPlaces.of(settings), settings.of_trainer
    metrics, health = metrics or Metrics(settings.model_name), health or Health(REDIS_TIMEOUT_S)
    remove_leftovers()
    ledger = connect(settings)
    make_known(ledger, settings.model_name)
    worker_name = name_of_worker(settings)
    attempts, job_meter = Attempts(), JobMeter(metrics)
    publisher = Publisher(ledger, TokenMeter(metrics))
    drain = Drain(attempts, settings.drain_s)

    def train(
        job: FinetuneJob,
        *,
        job_id: str,
        fence: int,
        directory: Path,
        progress: ReportProgress,
        stop: AskStop,
        committed: ReportCommit,
    ) -> FinetuneResult:
        surroundings = Places(settings, directory, job_id, fence)
        return finetune(job, places=surroundings, progress=progress, stop=stop, committed=committed)

    return TrainerProcess(
        worker_name=worker_name,
        settings=settings,
        ledger=ledger,
        publisher=publisher,
        pipeline=FinetunePipeline(
            model=settings.model_name,
            ledger=ledger,
            attempts=attempts,
            publisher=publisher,
            meter=job_meter,
            places=places,
            train=train,
            is_draining=lambda: drain.is_draining,
            max_retries=settings.max_retries,
        ),
        attempts=attempts,
        consumption=Consumption(settings.concurrency),
        health=health,
        metrics=metrics,
        claimer=Claimer(ledger, worker=worker_name, model=settings.model_name, on_refusal=job_meter.refused),
        circuit=Circuit(lambda _: True, job_meter.fell_sick),  # a training that fails says nothing about the next one
        drain=drain,
        heartbeat=heartbeat(settings, ledger, attempts, worker_name),
    )
