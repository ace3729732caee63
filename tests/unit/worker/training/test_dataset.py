"""Data sets in folders and in S3: what is read of them, and every fault at once, with its line."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from api_stub.contract.conversation import ImagePart, MediaPart, Role, TextPart
from tests.servers import S3Server
from tests.training_data import DataFolder, access, asked
from worker.errors import InvalidRequest, MediaForbidden
from worker.media.sniff import MediaKind
from worker.media.types import DecodedClip, DecodedImage
from worker.training.dataset import DatasetBroken, Finding, open_dataset

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    """An empty folder."""
    return DataFolder(tmp_path)


def findings_of(folder: DataFolder) -> tuple[Finding, ...]:
    with pytest.raises(DatasetBroken) as broken:
        folder.open()
    return broken.value.findings


def says(text: object, role: str = "user") -> dict[str, object]:
    return {"role": role, "content": text}


def test_every_broken_row_is_reported_at_once_with_its_line(folder: DataFolder) -> None:
    good, clip = folder.picture("good.png"), folder.clip("clip.mp4")
    whole = (folder.path / good).read_bytes()
    (folder.path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder.path / "empty.png").write_bytes(b"")
    (folder.path / "paper.png").write_bytes(b"%PDF-1.7\n")
    folder.picture("large.png", width=300, height=300)
    os.mkfifo(folder.path / "pipe.png")
    (folder.path / "folder.png").mkdir()
    answer = says("yes", "assistant")
    broken: list[tuple[object, str]] = [
        ("{", "not JSON"),
        ("[1]", "a row is a JSON object"),
        ('{"file_name": "good.png", "text": "a", "text": "b"}', "'text' is there twice"),
        ({"text": "a"}, "file_name is missing"),
        ({"file_name": 3, "text": "a"}, "file_name: a name is required, got 3"),
        ({"file_name": [], "text": "a"}, "file_name: 1 to 64 files, got 0"),
        ({"file_name": "../secret.png", "text": "a"}, "does not lie in the data set's folder"),
        ({"file_name": "/etc/passwd", "text": "a"}, "does not lie in the data set's folder"),
        ({"file_name": "s3://other/a.png", "text": "a"}, "does not lie in the data set's folder"),
        ({"file_name": "absent.png", "text": "a"}, "absent.png: cannot be read: No such file"),
        ({"file_name": "cut.png", "text": "a"}, "cut.png: "),
        ({"file_name": "empty.png", "text": "a"}, "empty.png: empty (0 bytes)"),
        ({"file_name": "paper.png", "text": "a"}, "a PDF"),
        ({"file_name": "large.png", "text": "a"}, "large.png: "),
        ({"file_name": "pipe.png", "text": "a"}, "pipe.png: not a file"),
        ({"file_name": "folder.png", "text": "a"}, "folder.png: not a file"),
        ({"file_name": good}, "one of text, texts, messages is required, got none"),
        ({"file_name": good, "text": "a", "texts": ["b"]}, "got text and texts"),
        ({"file_name": good, "text": " \n"}, "text: empty text"),
        ({"file_name": good, "text": 7}, "text: text is required, got 7"),
        ({"file_name": good, "texts": []}, "texts: a list of captions is required"),
        ({"file_name": good, "texts": ["a", ""]}, "texts: empty text"),
        ({"file_name": good, "text": "a <image> of a cat"}, "<image> inside a text shows no picture"),
        ('{"file_name": "good.png", "text": "\\ud800"}', "half of a surrogate pair"),
        ({"file_name": good, "text": "a", "split": "dev"}, 'one of train, validation, test is required, got "dev"'),
        ({"file_name": good, "text": "a", "kind": ""}, "kind: a name is required"),
        ({"file_name": good, "messages": []}, "messages: a list of turns is required"),
        ({"file_name": good, "messages": [says("x", "bot"), answer]}, "0.role: one of system, user, assistant"),
        ({"file_name": good, "messages": [says("x"), says(" ", "assistant")]}, "messages.1.content.0: empty text"),
        ({"file_name": good, "messages": [says("x")]}, "the last turn must be the assistant's"),
        ({"file_name": good, "messages": [answer]}, "no user's turn in which the pictures could be"),
        ({"file_name": good, "messages": [says([IMAGE, IMAGE]), answer]}, "a part of type image without a file"),
        ({"file_name": [good, good], "messages": [says([IMAGE]), answer]}, "messages: parts for 1 of 2 files"),
        ({"file_name": good, "messages": [says("x"), says([IMAGE], "assistant")]}, "belong to user's turns"),
        ({"file_name": good, "messages": [says("x"), answer, answer]}, "messages.2: an assistant's turn must follow"),
        ({"file_name": good, "messages": [says([{"type": "sound"}]), answer]}, "type: one of text, image, video"),
        ({"file_name": good, "messages": [says([{"type": "image", "url": "x"}]), answer]}, "unknown field 'url'"),
        ({"file_name": good, "messages": [says([VIDEO]), answer]}, "a part says video, the file is image"),
        ({"file_name": clip, "messages": [says([IMAGE]), answer]}, "a part says image, the file is video"),
    ]  # fmt: skip
    folder.write(row for row, _ in [*broken, ({"file_name": good, "text": "a"}, "")])  # type: ignore[misc]
    findings = findings_of(folder)
    assert [(finding.file, finding.line) for finding in findings] == [
        ("metadata.jsonl", number) for number in range(1, len(broken) + 1)
    ]
    for finding, (row, message) in zip(findings, broken, strict=True):
        assert message in finding.message, row


@pytest.mark.parametrize(
    ("rows", "line", "message"),
    [
        ([], None, "no rows"),
        (["good 1"], None, "no row is for validation"),
        (["good 1", "good 1"], None, "no row is for validation"),
        (["train 1", "train 2"], None, "no row is for validation"),
        (["validation 1", "test 2"], None, "no row is for train"),
        (["train 1", "good 2", "validation 3"], 2, "split: missing, and other rows have one"),
    ],
)
def test_a_data_set_without_a_part_that_is_needed_is_refused(
    folder: DataFolder, rows: list[str], line: int | None, message: str
) -> None:
    made = []
    for row in rows:
        split, number = row.split()
        name = folder.picture(f"{number}.png", int(number))
        made.append({"file_name": name, "text": "a", **({} if split == "good" else {"split": split})})
    folder.write(made)
    assert findings_of(folder) == (Finding("metadata.jsonl", line, message),)


def test_metadata_that_cannot_be_read_are_a_finding(folder: DataFolder) -> None:
    assert "No such file" in findings_of(folder)[0].message
    (folder.path / "metadata.jsonl").write_bytes(b'{"file_name": "a"}\n{"text": "\xff"}\n')
    assert findings_of(folder) == (Finding("metadata.jsonl", 2, "not UTF-8 (byte 29)"),)


def test_rows_are_split_by_seed_and_rows_about_one_picture_stay_together(folder: DataFolder) -> None:
    names = [folder.picture(f"{number}.png", number) for number in range(10)]
    folder.write({"file_name": name, "text": f"{name} {part}"} for name in names for part in "ab")
    dataset = folder.open(seed=1)
    assert len(dataset.validation) == 2
    assert len({example.files for example in dataset.validation}) == 1
    assert sorted(example.line for example in (*dataset.train, *dataset.validation)) == list(range(1, 21))
    assert folder.open(seed=1).validation == dataset.validation
    assert len({folder.open(seed=seed).validation for seed in range(4)}) > 1


def test_a_row_names_its_split_its_kind_and_its_texts(folder: DataFolder) -> None:
    for name in ("a.png", "sub/b.png"):
        folder.picture(name)
    folder.write(
        [
            {"file_name": "a.png", "texts": ["one", "two", "drei ü"], "split": "train", "kind": "caption", "more": 1},
            "",
            {"file_name": ["a.png", "./sub/b.png"], "text": "both", "split": "validation"},
            {"file_name": [], "messages": asked("Hello?", "Hi."), "split": "test"},
        ]
    )
    dataset = folder.open()
    (train,), (validation,), (test,) = dataset.train, dataset.validation, dataset.test
    assert (train.line, train.texts, train.kind) == (1, ("one", "two", "drei ü"), "caption")
    assert (validation.line, validation.files) == (3, ("a.png", "sub/b.png"))
    assert test.files == ()
    drawn = [train.drawn_text(7, epoch, 0) for epoch in range(12)]
    assert set(drawn) == set(train.texts)
    assert drawn == [train.drawn_text(7, epoch, 0) for epoch in range(12)]
    assert test.drawn_text(7, 0, 0) is None


def test_pictures_stand_where_the_row_says_else_before_the_first_question(folder: DataFolder) -> None:
    for name in ("a.png", "b.png"):
        folder.picture(name)
    parts = [{"type": "text", "text": "First", "image": None}, IMAGE, {"type": "text", "text": "then"}, IMAGE]
    folder.write(
        [
            {"file_name": ["a.png", "b.png"], "messages": [says(parts), says("ok", "assistant")], "split": "train"},
            {
                "file_name": "a.png",
                "messages": [says("Be brief.", "system"), *asked("What?", "Noise.")],
                "split": "train",
            },
        ]
    )
    placed, first = folder.open(needed=("train",)).train
    assert placed.messages is not None
    assert [type(part) for part in placed.messages[0].content] == [TextPart, ImagePart, TextPart, ImagePart]
    assert first.messages is not None
    assert [turn.role for turn in first.messages] == [Role.SYSTEM, Role.USER, Role.ASSISTANT]
    assert [type(part) for part in first.messages[1].content] == [MediaPart, TextPart]


def test_media_are_decoded_again_in_order_and_a_changed_file_is_refused(folder: DataFolder) -> None:
    folder.picture("a.png", width=20, height=10)
    clip = folder.clip("c.mp4")
    folder.write([{"file_name": ["a.png", clip], "text": "a", "split": "train"}])
    dataset = folder.open(needed=("train",))
    still, moving = dataset.media(dataset.train[0])
    assert isinstance(still, DecodedImage)
    assert still.pixels.size == dataset.files["a.png"].sizes[0] == (20, 10)
    assert isinstance(moving, DecodedClip)
    assert (len(moving.frames), dataset.files[clip].kind) == (8, MediaKind.VIDEO)
    assert dataset.files[clip].timestamps_s == moving.timestamps_s
    folder.picture("a.png", seed=5, width=21, height=10)
    with pytest.raises(DatasetBroken, match=r"a\.png: the file has changed"):
        dataset.media(dataset.train[0])


def test_the_digest_follows_rows_and_files_and_not_their_place(folder: DataFolder, tmp_path: Path) -> None:
    def digest(path: Path, text: str = "a", seed: int = 0) -> str:
        path.mkdir(exist_ok=True)
        one = DataFolder(path)
        one.write([{"file_name": one.picture("a.png", seed), "text": text, "split": "train"}])
        return one.open(needed=("train",)).digest

    first = digest(tmp_path / "one")
    assert digest(tmp_path / "two") == first
    assert len({first, digest(tmp_path / "two", text="b"), digest(tmp_path / "two", seed=1)}) == 3


def _decoded_in_a_fork(work: Callable[[], bytes]) -> bytes:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send_bytes(work()), daemon=True)
    child.start()
    try:
        assert receiver.poll(60.0), "the forked process does not answer"
        return receiver.recv_bytes()
    finally:
        child.terminate()
        child.join(10.0)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside threads, as data loaders do
def test_a_forked_process_decodes_with_processes_of_its_own(folder: DataFolder) -> None:
    folder.write([{"file_name": folder.picture("a.png"), "text": "a", "split": "train"}])
    dataset = folder.open(needed=("train",))

    def pixels() -> bytes:
        (medium,) = dataset.media(dataset.train[0])
        assert isinstance(medium, DecodedImage)
        return np.asarray(medium.pixels).tobytes()

    before = access().decoders.pids
    assert _decoded_in_a_fork(pixels) == pixels()
    assert set(access().decoders.pids) >= set(before)


def test_an_s3_prefix_is_the_same_data_set_as_the_folder(
    folder: DataFolder, tmp_path: Path, s3_server: S3Server, s3_client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    names = [folder.picture(f"sub/ü {number}.png", number) for number in range(3)]
    folder.write({"file_name": name, "text": name} for name in names)
    for name in ("metadata.jsonl", *names):
        s3_client.upload_file(str(folder.path / name), "media", f"data/{name}")
    place = tmp_path / "kept"
    place.mkdir()
    reader = access(s3_server.url)
    dataset = open_dataset("s3://media/data", seed=3, access=reader, directory=place)
    assert dataset.digest == folder.open().digest
    assert dataset.validation == folder.open(seed=3).validation
    assert isinstance(dataset.media(dataset.train[0])[0], DecodedImage)
    s3_client.delete_object(Bucket="media", Key=f"data/{names[1]}")
    with pytest.raises(DatasetBroken) as broken:
        open_dataset("s3://media/data/", seed=3, access=reader, directory=place)
    assert [finding.line for finding in broken.value.findings] == [2]
    with pytest.raises(DatasetBroken, match="no such object"):
        open_dataset("s3://media/elsewhere/", seed=3, access=reader, directory=place)
    with pytest.raises(MediaForbidden):
        open_dataset("s3://private/data/", seed=3, access=reader, directory=place)
    with pytest.raises(InvalidRequest, match="a folder or s3://bucket/prefix/"):
        open_dataset("https://example.org/data/", seed=3, access=reader, directory=place)
