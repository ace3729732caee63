"""The tables of `docs/families.md`: what holds for which model family, found out by trying it on tiny checkpoints.

`python -m tests.families_table --write` tries what this interpreter can load, families that need torchvision only where
it is installed, and replaces those rows; the others stay. No cell is written by hand: each is what a worker does.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from transformers.utils.logging import disable_progress_bar

from api_stub.contract.conversation import Turn
from tests.tiny.decoders import REFUSED, ROWS_ONLY, SERVED, llava_with, mllama
from tests.tiny.every_family import WITH_TORCHVISION, WITHOUT_TORCHVISION, build_any
from tests.tiny.families import Parts, save
from tests.tiny.more_families import qwen3_5
from tests.tiny.quantised import ROUNDING, errors_of_a_prompt
from tests.unit.worker.engine.crowds import (
    check_crowd,
    check_pictures_matter,
    jobs_of,
    prepare,
    upstream_form,
)
from tests.unit.worker.engine.harness import request
from tests.unit.worker.prompting.conversations import IMAGE, VIDEO, Part, clip, image, user
from worker.engine.config import PagedConfig
from worker.engine.request import Request
from worker.engine.runner.build import build_runner
from worker.engine.runner.dense import DenseRunner
from worker.engine.runner.paged import PagedRunner
from worker.errors import CannotStart, InvalidRequest
from worker.media.types import DecodedMedia
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel, load
from worker.prompting.pixels import FixedSize, SizeRule
from worker.prompting.prepare import PromptBuilder, trial_prompts
from worker.settings import Dtype, Quantization, WorkerSettings

PAGE: Final = Path(__file__).parents[1] / "docs" / "families.md"
BLOCK: Final = r"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)"
FAMILY_COLUMNS: Final = (
    "family", "class", "text decoder", "served from", "rows too", "pictures in one prompt", "clips",
    "compared with `generate`", "quantised", "pixel limits", "asked by",
)  # fmt: skip
DECODER_COLUMNS: Final = ("text decoder", "in", "served from", "why not otherwise")

PAGED: Final = PagedConfig(block_size=8)
MAX_MODEL_LEN: Final = 512
#: Jobs of a mixed crowd: each shape of prompt once.
NUM_JOBS: Final = 7
#: Pictures that are tried in one prompt.
COUNTS: Final = (0, 1, 2, 3)

Row = tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A loaded tiny checkpoint, and how a worker asks it."""

    name: str
    directory: Path
    loaded: LoadedModel
    builder: PromptBuilder
    trials: Sequence[ModelInputs]


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is said on the way; NumPy 2 complains about processors of PaliGemma and GLM-4V."""
    disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
        yield


def family_row(name: str) -> Row:
    """Load the family's tiny checkpoint and find out every cell. Raises AssertionError where an answer is wrong."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        family = _family(name, build_any(name, Path(folder)))
        can = family.loaded.capabilities
        paged, rows = (
            build_runner(family.loaded.model, 4, MAX_MODEL_LEN, kind, trials=family.trials) for kind in (PAGED, None)
        )
        return (
            name,
            f"`{type(family.loaded.model).__name__}`",
            f"`{family.loaded.model.config.get_text_config(decoder=True).model_type}`",
            _served_from(paged, family),
            "yes" if isinstance(rows, DenseRunner) else "no",
            ", ".join(str(count) for count in COUNTS if _takes(family, count)),
            _clips(family),
            _compared(family),
            ", ".join(kind.value for kind in (Quantization.INT8, Quantization.NF4) if _is_right(family, kind)) or "no",
            _limits(family.builder),
            "chat template" if can.captioner is None else f"{can.captioner.family}'s captioner",
        )


def decoder_rows() -> Iterator[Row]:
    """Put each text decoder into a tiny LLaVA and see what a worker does with it."""
    options: Mapping[str, Mapping[str, object]] = {
        **SERVED,
        **{name: given for name, (given, _) in (ROWS_ONLY | REFUSED).items()},
    }
    for model_type, given in options.items():
        yield _decoder_row(model_type, llava_with(model_type, given))
    yield _decoder_row("mllama_text_model", mllama)


def torchvision_decoder_rows() -> Iterator[Row]:
    """See what a worker does with models of other decoders whose processors need torchvision."""
    yield _decoder_row("qwen3_5_text", qwen3_5)


def _decoder_row(model_type: str, make: Callable[[], Parts]) -> Row:
    with tempfile.TemporaryDirectory() as folder, quiet():
        family = _family(model_type, save(make, Path(folder)))
        model = family.loaded.model
        assert model.config.get_text_config(decoder=True).model_type == model_type
        place = f"`{type(model).__name__}`"
        try:
            max_model_len = min(MAX_MODEL_LEN, family.loaded.max_context)
            runner = build_runner(model, 4, max_model_len, PAGED, trials=family.trials)
        except CannotStart as refused:
            reason = str(refused).partition("cannot be served here (")[2].removesuffix(")") or str(refused)
            return (f"`{model_type}`", place, "refused", _steady(reason))
        served = "rows" if isinstance(runner, DenseRunner) else _served_from(runner, family)
        return (f"`{model_type}`", place, served, _steady(runner.why_not_paged or ""))


def _family(name: str, directory: Path) -> Family:
    loaded = load(WorkerSettings(model=str(directory)))
    builder = PromptBuilder(loaded)
    return Family(name, directory, loaded, builder, trial_prompts(builder, loaded.capabilities))


def _served_from(runner: PagedRunner | DenseRunner, family: Family) -> str:
    if isinstance(runner, DenseRunner):
        return f"rows; not from blocks: {_steady(runner.why_not_paged or '')}"
    in_pieces = {}
    for kind in (0, 1):
        prompts = [trial for trial in family.trials if ("pixel_values" in trial.tensors) == bool(kind)]
        for inputs in prompts[:1]:
            generation = request(inputs, max_new_tokens=1)
            each = Request(generation, submitted_at=0.0, pictures=runner.cut(generation))
            with torch.inference_mode():
                runner.look_ahead([each])
                runner.allocate(each)
                in_pieces[kind] = each.is_chunkable
                runner.free(each)
    if all(in_pieces.values()):
        return "blocks, prompts in chunks"
    return "blocks, prompts with pictures whole" if in_pieces.get(0) else "blocks, prompts whole"


def _takes(family: Family, count: int) -> bool:
    """Whether a prompt of so many pictures is prepared and answered."""
    turns, media = (user(*[IMAGE] * count, "What is this?"),), [image(seed) for seed in range(count)]
    try:
        inputs = prepare(family.builder, turns, media)
    except InvalidRequest:
        return False
    with torch.inference_mode():
        ids = family.loaded.model.generate(**inputs.tensors, max_new_tokens=1, do_sample=False)
    return int(ids.shape[1]) > inputs.num_prompt_tokens


def _clips(family: Family) -> str:
    asked: Mapping[str, tuple[tuple[Part, ...], list[DecodedMedia]]] = {
        "alone": ((VIDEO,), [clip(1, 4)]),
        "beside pictures": ((IMAGE, VIDEO), [image(1), clip(1, 4)]),
        "of different lengths": ((VIDEO, VIDEO), [clip(1, 4), clip(2, 2)]),
    }
    forms = {}
    for which, (parts, media) in asked.items():
        turns: tuple[Turn, ...] = (user(*parts, "What moves?"),)
        try:
            inputs = prepare(family.builder, turns, media)
        except InvalidRequest:
            return "no"
        forms[which] = upstream_form(family.loaded, inputs, turns, media)
    others = [f"{which} {form}" for which, form in forms.items() if form != forms["alone"]]
    return "; ".join([forms["alone"], *others])


def _compared(family: Family) -> str:
    """Return what was compared; an answer that differs raises AssertionError."""
    loaded, builder = family.loaded, family.builder
    check_pictures_matter(loaded, builder)
    jobs = jobs_of(loaded, builder, NUM_JOBS)
    backends = []
    for paged in (PAGED, None):
        runner, _ = check_crowd(loaded, jobs, paged, runs_ahead=True, num_cancelled=0)
        backends.append("blocks" if isinstance(runner, PagedRunner) else "rows")
    return f"{len(jobs)} mixed jobs: {', '.join(dict.fromkeys(backends))}"


def _is_right(family: Family, kind: Quantization) -> bool:
    """Whether every quantised layer computes what its weights stand for, on the inputs of a prompt."""
    errors = errors_of_a_prompt(family.directory, kind, Dtype.FLOAT32)
    return bool(errors) and all(error < ROUNDING for error in errors.values())


def _limits(builder: PromptBuilder) -> str:
    limits = builder.limits
    named = [
        f"{medium} {_named(way)}"
        for medium, way in (("pictures", limits.pictures), ("clips", limits.clips))
        if way is not None and not isinstance(way, FixedSize)
    ]
    return "; ".join(named) or "none"


def _named(way: SizeRule) -> str:
    return "min_pixels, max_pixels" if way.takes_min else "max_pixels"


def _steady(reason: str) -> str:
    """Leave out of a reason what differs from processor to processor."""
    return re.sub(r" by [\d.e+-]+ of the largest", "", reason).replace("|", "\\|")


def read(text: str, name: str) -> dict[str, Row]:
    """Return the rows of a table of the page, by their first cell."""
    block = re.search(BLOCK.format(name=name), text, re.DOTALL)
    assert block is not None, f"docs/families.md has no table {name}"
    lines = block[0].splitlines()[3:-1]
    rows = [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines]
    return {row[0]: row for row in rows}


def with_rows(text: str, name: str, columns: Row, rows: Sequence[Row]) -> str:
    """Return the page with these rows in one of its tables."""
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    lines.insert(1, "|" + "---|" * len(columns))
    table = "\n".join(lines) + "\n"
    return re.sub(BLOCK.format(name=name), lambda match: f"{match[1]}{table}{match[2]}", text, flags=re.DOTALL)


def write() -> None:
    """Replace the rows that can be found out here."""
    text = PAGE.read_text()
    has_torchvision = find_spec("torchvision") is not None
    families, decoders = read(text, "families"), read(text, "decoders")
    for name in WITH_TORCHVISION if has_torchvision else WITHOUT_TORCHVISION:
        families[name] = family_row(name)
    found = torchvision_decoder_rows() if has_torchvision else decoder_rows()
    decoders |= {row[0]: row for row in found}
    ordered = [families[name] for name in (*WITHOUT_TORCHVISION, *WITH_TORCHVISION) if name in families]
    text = with_rows(text, "families", FAMILY_COLUMNS, ordered)
    PAGE.write_text(with_rows(text, "decoders", DECODER_COLUMNS, sorted(decoders.values(), key=_served_first)))


def _served_first(row: Row) -> tuple[int, str]:
    return ["blocks", "rows", "refused"].index(re.split(r"[,;]", row[2])[0]), row[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True, help="replace the rows that can be found out")
    parser.parse_args()
    torch.set_num_threads(1)
    write()
