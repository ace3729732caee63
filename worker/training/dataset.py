"""Opens a data set: `metadata.jsonl` with pictures and clips beside it, in a folder or under an S3 prefix.

In: a folder or `s3://bucket/prefix/`. Out: a `Dataset`, all of which was checked: every row was read and every file was
decoded once, by the sandboxed decoders. Otherwise one `DatasetBroken` with all findings. Knows no model; what depends
on one is checked by `worker.training.labels`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from api_stub.contract.conversation import ImagePart, TextPart, VideoPart
from api_stub.contract.job import DEFAULT_NUM_FRAMES
from api_stub.contract.media import S3Object
from worker.errors import InvalidRequest, MediaCorrupt, MediaNotFound, MediaTooLarge, MediaUnsupported
from worker.media.access import MediaAccess
from worker.media.sniff import MediaKind
from worker.media.types import DecodedMedia
from worker.training.example import DatasetBroken, Example, Finding
from worker.training.files import DataFile, MediaReader, Source, check_files
from worker.training.metadata import MAX_METADATA_BYTES, METADATA, Row, Split, read_rows

__all__ = ["METADATA", "Dataset", "DatasetBroken", "Example", "Finding", "Split", "open_dataset"]

#: Of the rows, where none names a split.
VALIDATION_SHARE: Final = 0.1


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set that was checked, on this machine's disk. Examples are in the order of their lines.

    digest: sha256 over the rows and the content of all files, in hex; where the data lie does not matter.
    files: by the names in examples.
    """

    uri: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    digest: str
    files: Mapping[str, DataFile]
    reader: MediaReader

    def split(self, name: Split) -> tuple[Example, ...]:
        """Return the examples of a split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def media(self, example: Example) -> tuple[DecodedMedia, ...]:
        """Decode the files of an example, in order. Any thread, also in a process that was forked (a data loader's).

        Raises DatasetBroken for a file that is no longer what was checked, and what decoders raise.
        """
        return self.reader.media(example, self.files)


def open_dataset(
    uri: str,
    *,
    seed: int,
    access: MediaAccess,
    directory: Path,
    num_frames: int = DEFAULT_NUM_FRAMES,
    needed: Sequence[Split] = ("train", "validation"),
    should_stop: Callable[[], None] = lambda: None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Dataset:
    """Read, check and return the data set at `uri`: a folder or `s3://bucket/prefix/`.

    seed: of the split into 90 % training and 10 % validation, where no row has a field `split`. Rows about the same
    files stay together.
    directory: where the objects of an S3 prefix are kept; it must exist as long as the data set is used.
    num_frames: sampled of each clip. needed: splits that must have rows.
    should_stop: called on several threads, between files and while one is read; raises to abort.
    on_progress: `(done, total)` files.

    Raises DatasetBroken with all findings, InvalidRequest or MediaForbidden for a place that may not be read, and what
    storage and decoders raise for a fault of their own.
    """
    source = Source(_place(uri), access, directory, num_frames, should_stop)
    try:
        metadata = source.read(METADATA, MAX_METADATA_BYTES)
    except (MediaNotFound, MediaCorrupt, MediaTooLarge, MediaUnsupported) as error:
        raise DatasetBroken([Finding(METADATA, None, str(error))]) from error
    rows, findings = read_rows(metadata)
    examples = [row.example for row in rows]
    names = sorted({name for example in examples for name in example.files})
    files, wrong = check_files(source, names, on_progress)
    findings += _findings_of_files(examples, files, wrong)
    # A row that is left out could be the one that a split lacks.
    findings += [] if findings else _findings_of_splits(rows)
    splits = {} if findings else _splits(rows, seed)
    findings += [
        Finding(METADATA, None, f"no row is for {name}") for name in needed if not findings and not splits.get(name)
    ]
    if findings:
        raise DatasetBroken(sorted(findings, key=lambda one: (one.line or 0, one.message)))
    return Dataset(
        uri=uri,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        digest=_digest(metadata, files),
        files=files,
        reader=MediaReader(access, num_frames),
    )


def _place(uri: str) -> str:
    if "://" not in uri:
        return uri
    place = uri if uri.endswith("/") else f"{uri}/"
    try:
        parsed = S3Object.parse(f"{place}{METADATA}")
    except ValueError as error:
        raise InvalidRequest(f"dataset: a folder or s3://bucket/prefix/ is required: {error}") from error
    return parsed.uri.removesuffix(METADATA)


def _findings_of_files(
    examples: Sequence[Example], files: Mapping[str, DataFile], wrong: Mapping[str, str]
) -> Iterator[Finding]:
    for example in examples:
        for name in dict.fromkeys(example.files):
            if name in wrong:
                yield Finding(METADATA, example.line, f"{name}: {wrong[name]}")
        yield from _findings_of_kinds(example, files)


def _findings_of_kinds(example: Example, files: Mapping[str, DataFile]) -> Iterator[Finding]:
    """Find parts that say image where the file is a clip, or the reverse."""
    parts = [part for turn in example.messages or () for part in turn.content if not isinstance(part, TextPart)]
    for name, part in zip(example.files, parts, strict=False):
        file = files.get(name)
        expected = {ImagePart: MediaKind.IMAGE, VideoPart: MediaKind.VIDEO}.get(type(part))
        if file is not None and expected is not None and file.kind is not expected:
            yield Finding(METADATA, example.line, f"{name}: a part says {expected}, the file is {file.kind}")


def _findings_of_splits(rows: Sequence[Row]) -> Iterator[Finding]:
    if len({row.split is None for row in rows}) > 1:
        for row in rows:
            if row.split is None:
                yield Finding(METADATA, row.example.line, "split: missing, and other rows have one")


def _splits(rows: Sequence[Row], seed: int) -> dict[Split, tuple[Example, ...]]:
    if rows[0].split is None:
        chosen = _chosen_for_validation(rows, seed)
        named: list[tuple[Split, Example]] = [
            ("validation" if row.example.files in chosen else "train", row.example) for row in rows
        ]
    else:
        named = [(row.split, row.example) for row in rows if row.split is not None]
    names: tuple[Split, ...] = ("train", "validation", "test")
    return {name: tuple(example for split, example in named if split == name) for name in names}


def _chosen_for_validation(rows: Sequence[Row], seed: int) -> set[tuple[str, ...]]:
    """Return the files of a tenth of the rows, at least of one; a picture in both splits would flatter the scores."""
    files = [row.example.files for row in rows]
    groups = list(dict.fromkeys(files))
    Random(f"{seed} split").shuffle(groups)
    wanted, num_chosen, chosen = max(1, round(VALIDATION_SHARE * len(rows))), 0, set[tuple[str, ...]]()
    for group in groups[:-1]:
        if num_chosen >= wanted:
            break
        chosen.add(group)
        num_chosen += files.count(group)
    return chosen


def _digest(metadata: bytes, files: Mapping[str, DataFile]) -> str:
    lines = [hashlib.sha256(metadata).hexdigest(), *(f"{files[name].sha256} {name}" for name in sorted(files))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
