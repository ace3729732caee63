"""`visionq finetune`: hand a fine-tuning job in and follow it."""

from __future__ import annotations

from typing import Annotated

import typer

from api_stub.cli.errors import reported
from api_stub.cli.flags import JsonFlag, TimeoutFlag, UrlFlag
from api_stub.cli.screen import follow
from api_stub.client.client import Client
from api_stub.contract.finetune import FinetuneMethod, FinetuneRecipe

Dataset = Annotated[str, typer.Argument(metavar="DATA", help="Data set: s3://bucket/prefix/ with its metadata.jsonl.")]
Base = Annotated[str, typer.Option(help="Model to start from: a name that the trainer knows, or s3://bucket/prefix/.")]
Output = Annotated[str, typer.Option(help="Where checkpoints go: s3://bucket/prefix/.")]
Method = Annotated[FinetuneMethod, typer.Option(help="Train all weights, or an adapter; qlora: beside nf4 weights.")]
Recipe = Annotated[FinetuneRecipe, typer.Option(help="How examples become labels; auto: what the model asks for.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data set.")]
MaxSteps = Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")]
LearningRate = Annotated[float | None, typer.Option(help="Highest learning rate.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples per forward.")]
Accumulation = Annotated[int | None, typer.Option("--gradient-accumulation", help="Batches per optimizer step.")]
EvalEvery = Annotated[int | None, typer.Option(help="Steps between evaluations, each with a checkpoint.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the split, the order and all that is drawn.")]
LoraRank = Annotated[int | None, typer.Option(help="Rank of the adapter.")]
FreezeVision = Annotated[bool | None, typer.Option("--freeze-vision", help="The vision tower learns nothing.")]
Resume = Annotated[bool | None, typer.Option("--resume", help="Go on from the newest checkpoint of the output.")]
Deadline = Annotated[float | None, typer.Option(help="Seconds from now after which the job ends.")]
Priority = Annotated[int | None, typer.Option(help="0 (first) to 9.")]
Tenant = Annotated[str | None, typer.Option(help="Who is asking.")]
JobIdFlag = Annotated[str | None, typer.Option("--job-id", help="Id of the job; the same id and job is the same job.")]


def finetune(
    dataset: Dataset,
    base: Base,
    output: Output,
    method: Method = FinetuneMethod.FULL,
    recipe: Recipe = FinetuneRecipe.AUTO,
    max_steps: MaxSteps = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    gradient_accumulation: Accumulation = None,
    eval_every: EvalEvery = None,
    lora_rank: LoraRank = None,
    freeze_vision: FreezeVision = None,
    seed: Seed = None,
    resume: Resume = None,
    deadline: Deadline = None,
    priority: Priority = None,
    tenant: Tenant = None,
    job_id: JobIdFlag = None,
    url: UrlFlag = None,
    timeout: TimeoutFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Fine-tune a model on a data set in S3, and show how far it is. Needs a worker that trains."""
    with reported(as_json, job_id), Client(url) as client:
        job = client.finetune(
            base,
            dataset=dataset,
            output=output,
            job_id=job_id,
            method=method,
            recipe=recipe,
            max_steps=max_steps,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            eval_every=eval_every,
            lora_rank=lora_rank,
            freeze_vision=freeze_vision,
            seed=seed,
            resume=resume,
            deadline_s=deadline,
            priority=priority,
            tenant=tenant,
        )
        with reported(as_json, job.id):
            follow(job, as_json, timeout)
