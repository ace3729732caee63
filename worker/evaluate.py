"""`visionq-worker evaluate`: how well a checkpoint answers about a data set, through the engine that serves it.

In: settings, whose model is evaluated, and a data set. Out: an `EvaluationRecord`. Generates greedily and in batches,
with the prompts that jobs get. No Redis.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from api_stub.contract.conversation import TextPart
from api_stub.contract.job import CaptionJob
from api_stub.contract.sampling import SamplingParams
from worker.bootstrap import engine_config, prompt_builder
from worker.engine.engine import Engine
from worker.engine.request import Finish, GenerationRequest
from worker.errors import EngineDead, GenerationFailed, InvalidRequest, RequestError
from worker.media.access import MediaAccess
from worker.media_access import media_access
from worker.models.digests import checkpoint_digest, folder_digest
from worker.models.loader import LoadedModel, load
from worker.models.source import find_model
from worker.prompting.prepare import PromptBuilder, trial_prompts
from worker.settings import WorkerSettings
from worker.training.dataset import METADATA, Dataset, Example, Split, open_dataset
from worker.training.manifest import STATE_FOLDER
from worker.training.objects import open_objects, training_client
from worker.training.question import question_of
from worker.training.record import EvaluationRecord, Mistake, versions
from worker.training.scores import NORMALISATION, Answered, normalise, score
from worker.training.state import RUN, Entry, RunState

MAX_MISTAKES: Final = 20
STOP_TIMEOUT_S: Final = 10.0
#: Of one batch: a large model on a CPU takes minutes for it.
BATCH_TIMEOUT_S: Final = 3_600.0


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What is asked, and how much. seed: of the 90/10 split, where the data set names none. max_examples: 0: all."""

    split: Split = "validation"
    seed: int = 0
    max_new_tokens: int = 128
    max_examples: int = 0


def evaluate(
    settings: WorkerSettings,
    data: str,
    options: EvaluationOptions,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> EvaluationRecord:
    """Answer the examples of a split and score the answers; `on_progress` gets `(done, total)` examples.

    Raises CannotStart for the model, DatasetBroken for the data set, InvalidRequest, naming the line, for an example
    that the model cannot be asked.
    """
    with tempfile.TemporaryDirectory(prefix="visionq-evaluate-") as directory, _media(settings) as access:
        dataset = open_dataset(
            data, seed=options.seed, access=access, directory=Path(directory), needed=(options.split,)
        )
        examples = dataset.split(options.split)
        examples = examples[: options.max_examples or len(examples)]
        loaded = load(settings)
        prompts = prompt_builder(settings, loaded)
        with _engine(settings, loaded, prompts) as engine:
            answers = list(_answers(engine, prompts, dataset, examples, settings.max_num_seqs, options, on_progress))
    return _record(settings, data, options, loaded, prompts, dataset, examples, answers)


def draw_history(settings: WorkerSettings, picture: Path) -> None:
    """Draw the curves of the run that left the settings' model. Raises InvalidRequest when there are none."""
    history = _history(settings)
    if not history:
        raise InvalidRequest(f"{settings.model}: its training run has measured nothing yet")
    try:
        # matplotlib is of the `train` extra, and needed for pictures only.
        import_module("worker.training.curves").draw_curves(history, picture)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{picture}: cannot be drawn: {error}") from error


def _history(settings: WorkerSettings) -> tuple[Entry, ...]:
    stored = None
    if settings.model.startswith("s3://") or Path(settings.model).expanduser().is_dir():
        stored = open_objects(settings.model, training_client(settings)).read(f"{STATE_FOLDER}/{RUN}")
    if stored is None:
        raise InvalidRequest(f"{settings.model}: no {STATE_FOLDER}/{RUN}, so there are no curves of a training run")
    try:
        return RunState.model_validate_json(stored[0]).history
    except ValidationError as error:
        raise InvalidRequest(f"{settings.model}: {STATE_FOLDER}/{RUN} is not the state of a training run") from error


def _answers(
    engine: Engine,
    prompts: PromptBuilder,
    dataset: Dataset,
    examples: Sequence[Example],
    batch_size: int,
    options: EvaluationOptions,
    on_progress: Callable[[int, int], None],
) -> Iterator[Answered]:
    """Yield an answer per example, in their order; several are generated together."""
    sampling = SamplingParams(max_new_tokens=options.max_new_tokens, temperature=0.0, seed=0)
    done = 0
    for some in (examples[start : start + batch_size] for start in range(0, len(examples), batch_size)):
        references: dict[str, tuple[str, ...]] = {}
        requests = []
        for example in some:
            try:
                turns, right = question_of(prompts, example)
                inputs = prompts.prepare(turns, dataset.media(example))
            except RequestError as error:
                raise InvalidRequest(f"{METADATA}:{example.line}: {error}") from error
            references[str(example.line)] = right
            requests.append(GenerationRequest(str(example.line), inputs, sampling))
        texts = _generate(engine, requests)
        for example in some:
            name = str(example.line)
            yield Answered(texts[name], references[name], example.kind)
        done += len(some)
        on_progress(done, len(examples))


def _generate(engine: Engine, requests: Sequence[GenerationRequest]) -> Mapping[str, str]:
    texts = {request.request_id: "" for request in requests}
    try:
        for output in engine.generate(requests, BATCH_TIMEOUT_S):
            texts[output.request_id] += output.text
            if output.finish is not None:
                _check(output.request_id, output.finish)
    except RequestError as error:
        raise InvalidRequest(f"{METADATA}: lines {', '.join(texts)}: {error}") from error
    return texts


def _check(line: str, finish: Finish) -> None:
    if finish.error is not None:
        raise GenerationFailed(finish.error)
    if finish.reason == "cancelled":
        raise EngineDead(f"the engine stopped before the answer about line {line} was complete")


def _record(
    settings: WorkerSettings,
    data: str,
    options: EvaluationOptions,
    loaded: LoadedModel,
    prompts: PromptBuilder,
    dataset: Dataset,
    examples: Sequence[Example],
    answers: Sequence[Answered],
) -> EvaluationRecord:
    report = score(answers)
    checkpoint, base = _digests(settings)
    wrong = [
        Mistake(line=example.line, answer=answer.text, references=answer.references)
        for example, answer in zip(examples, answers, strict=True)
        if normalise(answer.text) not in map(normalise, answer.references)
    ]
    return EvaluationRecord(
        model=settings.model,
        checkpoint=checkpoint,
        base=base,
        dataset=data,
        data_digest=dataset.digest,
        split=options.split,
        num_examples=len(answers),
        seed=options.seed,
        prompt=_caption_prompt(prompts),
        normalisation=NORMALISATION,
        settings=_settings(settings, options, loaded),
        versions=versions(),
        scores=report.overall.metrics(),
        by_kind={kind: scores.metrics() for kind, scores in report.by_kind.items()},
        num_by_kind={kind: scores.num_answers for kind, scores in report.by_kind.items()},
        mistakes=tuple(wrong[:MAX_MISTAKES]),
    )


def _settings(
    settings: WorkerSettings, options: EvaluationOptions, loaded: LoadedModel
) -> dict[str, str | int | float]:
    return {
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "quantization": str(settings.quantization),
        "attention": loaded.attention,
        "chat_template": loaded.capabilities.template_source or "none",
        "generation_config": settings.generation_config,
        "max_num_seqs": settings.max_num_seqs,
        "max_new_tokens": options.max_new_tokens,
        "temperature": 0.0,
    }


def _caption_prompt(prompts: PromptBuilder) -> str:
    """Return the text of a caption without a prompt, which is the model's own."""
    turns = prompts.turns(CaptionJob(media=("s3://data/0",)))
    return "".join(part.text for turn in turns for part in turn.content if isinstance(part, TextPart))


def _digests(settings: WorkerSettings) -> tuple[str, str | None]:
    """Return the digest of the model's weights; of an adapter and of its base, where it is one."""
    found = find_model(settings)
    whole = checkpoint_digest(settings.model, found.place, found.revision)
    return (whole, None) if found.adapter is None else (folder_digest(found.adapter.folder), whole)


@contextmanager
def _engine(settings: WorkerSettings, loaded: LoadedModel, prompts: PromptBuilder) -> Iterator[Engine]:
    trials = trial_prompts(prompts, loaded.capabilities)
    engine = Engine(loaded.model, loaded.tokenizer, engine_config(settings, loaded), trials=trials)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(STOP_TIMEOUT_S)


@contextmanager
def _media(settings: WorkerSettings) -> Iterator[MediaAccess]:
    access = media_access(settings)
    try:
        yield access
    finally:
        access.decoders.close()
