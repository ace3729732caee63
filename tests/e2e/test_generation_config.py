"""A checkpoint's generation config through the real queue: it holds where a producer says nothing, and only there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from celery import Celery

from api_stub.client.client import Client
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server
from tests.tiny.reference import Reference

QUESTION = "How many people are there in this picture?"
NUM_TOKENS = 24
FIELDS = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 3, "min_new_tokens": 12, "num_beams": 2}
NEUTRAL = {"repetition_penalty": 1.0, "min_new_tokens": 0}


def generated(reference: Reference, **options: object) -> str:
    """Return what `generate` answers to the question, one beam at a time."""
    messages = reference.single_turn([], QUESTION)
    prompt = reference.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = reference.processor(text=[prompt], return_tensors="pt")
    with torch.no_grad():
        ids = reference.model.generate(
            **inputs, **({"max_new_tokens": NUM_TOKENS, "do_sample": False, "num_beams": 1} | options)
        )
    new = ids[0, inputs["input_ids"].shape[1] :]
    return str(reference.processor.tokenizer.decode(new, skip_special_tokens=True)).lstrip()


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_producers_that_say_nothing_get_what_generate_says(
    choice: str,
    tiny_checkpoint: Callable[[str], Path],
    redis_server: RedisServer,
    s3_server: S3Server,
    tmp_path: Path,
) -> None:
    checkpoint, model = tmp_path / "checkpoint", f"config-{choice}"
    shutil.copytree(tiny_checkpoint("idefics2"), checkpoint)
    plain = generated(Reference(checkpoint))
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | FIELDS))
    reference = Reference(checkpoint)
    silent, neutral = generated(reference), generated(reference, **NEUTRAL)
    assert len({plain, silent, neutral}) == 3

    worker = WorkerProcess(
        tmp_path, redis_server.url, s3_server.url, model=checkpoint, model_name=model, generation_config=choice
    ).wait_ready()
    celery = Celery(broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    try:
        with Client(redis_server.url) as client:
            ours = client.vqa(question=QUESTION, model=model, max_new_tokens=NUM_TOKENS).result(timeout=60).text
            given = client.vqa(question=QUESTION, model=model, max_new_tokens=NUM_TOKENS, **NEUTRAL)
            given_text = given.result(timeout=60).text
        kwargs = {"question": QUESTION, "model": model, "sampling": {"max_new_tokens": NUM_TOKENS}}
        foreign = celery.send_task("visionq.vqa", kwargs=kwargs, queue=f"visionq.{model}").get(timeout=60)["text"]
    finally:
        worker.kill()
        celery.close()
    if choice == "auto":
        assert (ours, foreign, given_text) == (silent, silent, neutral)
        assert worker.text().count("generation_config fields ignored: num_beams") == 1
    else:
        assert (ours, foreign, given_text) == (plain, plain, plain)
        assert "fields ignored" not in worker.text()
