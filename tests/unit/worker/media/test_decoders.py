"""Decoder processes: confined, replaced when they die, gone with their worker."""

from __future__ import annotations

import fcntl
import io
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from tests.corpus.images import slow_jpeg
from tests.servers import eventually
from tests.unit.worker.media.drawn_clips import B_FRAMES, number_of
from worker.errors import DecoderFailed, MediaCorrupt, MediaTooLarge, OutOfMemory
from worker.media import decoder_process
from worker.media.decoder_process import DecodeLimits, DecoderProcess
from worker.media.decoder_protocol import MAX_MESSAGE_BYTES, Decoded, PictureHeader, encode, read_reply
from worker.media.decoders import Decoders
from worker.media.image import decode_image
from worker.media.sniff import MediaKind
from worker.media.types import DecodedClip, DecodedImage, DecodedMedia, MediaPolicy
from worker.media.video import sample_clip

POLICY = MediaPolicy(frozenset())
MEMORY = 768 << 20


class Stopped(Exception):
    """What a cancelled job's `should_stop` raises."""


def go_on() -> None:
    """A job that nobody cancels."""


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    decoders = Decoders(2, DecodeLimits(MEMORY, image_s=200.0, video_s=200.0))
    yield decoders
    decoders.close()


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red"
    Image.new("RGB", (30, 20), (255, 0, 0)).save(path, "PNG")
    return path


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A picture that keeps a decoder busy for far longer than any test waits."""
    path = tmp_path / "slow"
    path.write_bytes(slow_jpeg())
    return path


def decode_still(decoders: Decoders, path: Path, should_stop: Callable[[], None] = go_on) -> Image.Image:
    media = decoders.decode(path, MediaKind.IMAGE, 0, POLICY, should_stop=should_stop)
    assert isinstance(media, DecodedImage)
    return media.pixels


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Start `work` on a thread; its answer or its error comes into the list."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:  # noqa: BLE001 - told to the test
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def open_pipes() -> list[str]:
    handles = [path.readlink().name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sorted(name for name in handles if name.startswith("pipe:"))


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_decoding(pid: int) -> bool:
    """Whether a process has used up processor time beyond what loading takes."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields[0] == "R" and int(fields[11]) > 120


def test_what_a_process_decodes_is_what_the_code_decodes(decoders: Decoders, tmp_path: Path) -> None:
    picture = Image.effect_noise((1200, 700), 90).convert("RGB")
    for pillow_format in ("JPEG", "PNG", "WEBP"):
        path = tmp_path / pillow_format
        picture.save(path, pillow_format)
        assert decode_still(decoders, path).tobytes() == decode_image(path, POLICY).pixels.tobytes()
    clip = decoders.decode(B_FRAMES, MediaKind.VIDEO, 5, POLICY, should_stop=go_on)
    here = sample_clip(B_FRAMES, 5, POLICY, should_stop=go_on)
    assert isinstance(clip, DecodedClip)
    assert (clip.timestamps_s, clip.duration_s, clip.fps) == (here.timestamps_s, here.duration_s, here.fps)
    assert [number_of(frame) for frame in clip.frames] == [number_of(frame) for frame in here.frames]
    assert len(decoders.pids) == 1, "one after the other needs one process"


def test_a_damaged_clip_starts_again_and_brings_no_frame_twice(decoders: Decoders, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    content = bytearray(B_FRAMES.read_bytes())
    media_at = content.index(b"mdat")
    content[media_at + 30_000 : media_at + 60_000] = bytes(30_000)
    path.write_bytes(content)
    there = decoders.decode(path, MediaKind.VIDEO, 6, POLICY, should_stop=go_on)
    here = sample_clip(path, 6, POLICY, should_stop=go_on)
    assert isinstance(there, DecodedClip)
    assert [frame.tobytes() for frame in there.frames] == [frame.tobytes() for frame in here.frames]
    assert there.timestamps_s == here.timestamps_s


def test_errors_keep_their_kind_and_words(decoders: Decoders, tmp_path: Path, red: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(red.read_bytes()[:60])
    with pytest.raises(MediaCorrupt, match="the png image cannot be decoded"):
        decode_still(decoders, broken)
    with pytest.raises(MediaTooLarge, match="the limit is 599"):
        decoders.decode(
            red, MediaKind.IMAGE, 0, MediaPolicy(frozenset(), max_image_pixels=599), should_stop=go_on
        )  # fmt: skip
    assert decode_still(decoders, red).size == (30, 20)
    assert len(decoders.pids) == 1, "a refusal costs no process"


def test_a_decoder_that_takes_too_long_is_replaced_and_noted(
    red: Path, slow: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decoders = Decoders(1, DecodeLimits(MEMORY, image_s=2.0, video_s=60.0))
    try:
        with pytest.raises(MediaTooLarge, match="longer than 2 s"):
            decode_still(decoders, slow)
        assert decoders.pids == []
        assert [vars(record)["action"] for record in caplog.records] == ["decoder_timeout"]
        assert decode_still(decoders, red).getpixel((1, 1)) == (255, 0, 0)
    finally:
        decoders.close()


def test_a_decoder_short_of_memory_says_so_and_is_replaced(tmp_path: Path, red: Path) -> None:
    decoders = Decoders(1, DecodeLimits(512 << 20, image_s=60.0, video_s=60.0))
    path = tmp_path / "clear"
    Image.new("RGBA", (7000, 7000), (1, 2, 3, 4)).save(path, "PNG", compress_level=1)
    try:
        with pytest.raises(MediaTooLarge, match=f"more than {512 << 20} bytes of memory"):
            decode_still(decoders, path)
        assert decoders.pids == []
        assert decode_still(decoders, red).size == (30, 20)
    finally:
        decoders.close()


def test_a_file_that_crashes_a_fresh_decoder_is_corrupt(decoders: Decoders, slow: Path, red: Path) -> None:
    thread, outcome = in_background(lambda: decode_still(decoders, slow))
    crashed: set[int] = set()
    while len(crashed) < 2:
        eventually(lambda: any(is_decoding(pid) for pid in set(decoders.pids) - crashed), 60, "it decodes")
        for pid in set(decoders.pids) - crashed:
            os.kill(pid, signal.SIGSEGV)
            crashed.add(pid)
    thread.join(60)
    assert isinstance(outcome[0], MediaCorrupt)
    assert "crashes the decoder (SIGSEGV)" in str(outcome[0])
    assert decode_still(decoders, red).size == (30, 20)


def test_a_crash_that_may_be_an_earlier_files_is_tried_again(decoders: Decoders, tmp_path: Path) -> None:
    path = tmp_path / "some"
    path.write_bytes(slow_jpeg(num_scans=250))
    thread, outcome = in_background(lambda: decode_still(decoders, path))
    eventually(lambda: any(is_decoding(pid) for pid in decoders.pids), 60, "it decodes")
    os.kill(decoders.pids[0], signal.SIGSEGV)
    thread.join(60)
    assert isinstance(outcome[0], Image.Image)


def test_a_decoder_that_the_system_kills_is_no_fault_of_the_file(decoders: Decoders, slow: Path) -> None:
    thread, outcome = in_background(lambda: decode_still(decoders, slow))
    eventually(lambda: any(is_decoding(pid) for pid in decoders.pids), 60, "it decodes")
    os.kill(decoders.pids[0], signal.SIGKILL)
    thread.join(60)
    assert isinstance(outcome[0], OutOfMemory)


def test_a_decoder_that_dies_with_nothing_to_do_is_nobodys_loss(decoders: Decoders, red: Path) -> None:
    decode_still(decoders, red)
    (pid,) = decoders.pids
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_alive(pid), 20, "it is dead")
    assert decode_still(decoders, red).size == (30, 20)
    assert pid not in decoders.pids


def test_an_answer_that_has_come_counts_however_late_the_worker_looks(red: Path) -> None:
    limit_s = 0.2
    decoders = Decoders(1, DecodeLimits(MEMORY, image_s=limit_s, video_s=60.0))
    answer = len(encode(PictureHeader(width=30, height=20))) + 30 * 20 * 3 + len(encode(Decoded()))

    def num_waiting() -> int:
        (decoder,) = decoders._busy
        return int.from_bytes(fcntl.ioctl(decoder._replies, termios.FIONREAD, bytes(4)), sys.byteorder)

    is_late = False

    def should_stop() -> None:
        nonlocal is_late
        if not is_late:
            begun_at = time.monotonic()
            eventually(lambda: num_waiting() == answer and time.monotonic() > begun_at + 2 * limit_s, 60, "it has come")
            is_late = True

    try:
        decoders.start()
        decoders.wait_ready()
        assert decode_still(decoders, red, should_stop).size == (30, 20)
        assert is_late
    finally:
        decoders.close()


def test_a_decoder_that_used_up_its_time_before_it_got_a_file_is_tried_anew(
    decoders: Decoders, red: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_still(decoders, red)
    (pid,) = decoders.pids
    os.kill(pid, signal.SIGXCPU)
    eventually(lambda: not is_alive(pid), 20, "it is dead")
    monkeypatch.setattr(DecoderProcess, "is_alive", True)  # it died a moment after it was asked
    assert decode_still(decoders, red).size == (30, 20)


def test_a_cancelled_job_leaves_at_once(decoders: Decoders, slow: Path, red: Path) -> None:
    decode_still(decoders, red)
    stop_at = time.monotonic() + 0.5

    def should_stop() -> None:
        if time.monotonic() > stop_at:
            raise Stopped

    with pytest.raises(Stopped):
        decode_still(decoders, slow, should_stop)
    assert time.monotonic() - stop_at < 10
    assert decoders.pids == []


def test_a_decoder_whose_start_nobody_waited_for_is_lent_to_nobody_else(
    decoders: Decoders, red: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def should_stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        decode_still(decoders, red, should_stop)
    assert decoders.pids == [], "its time to start would pass before the next job comes"
    with monkeypatch.context() as patch:
        patch.setattr(decoder_process, "START_S", -1.0)
        with pytest.raises(DecoderFailed):
            decode_still(decoders, red)
    assert decoders.pids == []
    assert decode_still(decoders, red).size == (30, 20)


def test_jobs_wait_for_a_free_decoder_and_may_leave_the_queue(slow: Path, red: Path) -> None:
    decoders = Decoders(1, DecodeLimits(MEMORY, image_s=60.0, video_s=60.0))
    thread, outcome = in_background(lambda: decode_still(decoders, slow))
    eventually(lambda: any(is_decoding(pid) for pid in decoders.pids), 60, "it decodes")
    stop_at = time.monotonic() + 0.3

    def should_stop() -> None:
        if time.monotonic() > stop_at:
            raise Stopped

    with pytest.raises(Stopped):
        decode_still(decoders, red, should_stop)
    assert len(decoders.pids) == 1
    decoders.close()
    thread.join(60)
    assert isinstance(outcome[0], OutOfMemory)
    assert decoders.pids == []


def test_many_jobs_share_few_decoders_and_nothing_is_left(red: Path) -> None:
    # Other modules share decoders that stay to the end of the run.
    pipes_before, threads_before = open_pipes(), set(threading.enumerate())
    decoders = Decoders(2, DecodeLimits(MEMORY, image_s=60.0, video_s=60.0))
    seen: set[int] = set()

    def work() -> DecodedMedia:
        for _ in range(10):
            media = decoders.decode(red, MediaKind.IMAGE, 0, POLICY, should_stop=go_on)
            seen.update(decoders.pids)
        return media

    running = [in_background(work) for _ in range(6)]
    for thread, _ in running:
        thread.join(60)
    assert all(isinstance(outcome[0], DecodedImage) for _, outcome in running)
    assert 1 <= len(seen) <= 2
    decoders.close()
    assert not [pid for pid in seen if is_alive(pid)]
    assert open_pipes() == pipes_before
    assert not [thread for thread in set(threading.enumerate()) - threads_before if "decoder" in thread.name]


def test_a_decoder_has_no_credentials_and_no_room(decoders: Decoders, red: Path, monkeypatch) -> None:
    monkeypatch.setenv("VISIONQ_REDIS_URL", "redis://:hunter2@127.0.0.1/0")
    decode_still(decoders, red)
    (pid,) = decoders.pids
    environment = Path(f"/proc/{pid}/environ").read_text()
    assert "FFMPEG" in environment
    assert not [secret for secret in ("hunter2", "AWS_", "VISIONQ_") if secret in environment]
    limits = Path(f"/proc/{pid}/limits").read_text()
    for name, value in (("Max address space", str(MEMORY)), ("Max file size", "0"), ("Max core file size", "0")):
        assert [line.split()[len(name.split())] for line in limits.splitlines() if line.startswith(name)] == [value]


CONFINED = """
import os, socket, subprocess, sys
from worker.media.sandbox import Confinement, confine
confine(Confinement(parent=os.getppid(), memory_bytes=1 << 30))
def outcome(attempt):
    try:
        attempt()
    except OSError as error:
        return type(error).__name__
    except MemoryError:
        return "MemoryError"
    return "done"
print([outcome(attempt) for attempt in (
    lambda: open(sys.argv[1], "rb").read(),
    lambda: open(sys.argv[1], "w"),
    lambda: open(sys.argv[1], "a"),
    lambda: os.unlink(sys.argv[1]),
    lambda: os.rename(sys.argv[1], sys.argv[1] + "x"),
    lambda: socket.socket(),
    lambda: socket.socketpair(),
    lambda: os.execv("/bin/true", ["true"]),
    lambda: subprocess.run(["/bin/true"]),
    lambda: os.kill(os.getppid(), 0),
    lambda: bytearray(2 << 30),
)])
"""


def test_a_confined_process_reads_and_does_nothing_else(red: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONFINED, str(red)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == str(["done", *["PermissionError"] * 9, "MemoryError"]), done.stderr
    assert red.exists()


WORKER = """
import sys
from pathlib import Path
from worker.media.decoder_process import DecodeLimits
from worker.media.decoders import Decoders
from worker.media.types import MediaPolicy
from worker.media.sniff import MediaKind
decoders = Decoders(2, DecodeLimits(1 << 30, 600.0, 600.0))
decoders.start()
decoders.wait_ready()
print(decoders.pids[0], flush=True)
decoders.decode(Path(sys.argv[1]), MediaKind.IMAGE, 0, MediaPolicy(frozenset()), should_stop=lambda: None)
"""


def test_a_decoder_ends_with_its_worker_in_the_middle_of_a_file(slow: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WORKER, str(slow)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        eventually(lambda: is_decoding(pid), 60, "it decodes")
        process.kill()
    eventually(lambda: not is_alive(pid), 20, "the decoder is gone")


def test_the_workers_process_loads_no_decoder_of_media() -> None:
    program = (
        "import sys, worker.media.collect\n"
        "print(sorted({'cv2', 'worker.media.image', 'worker.media.video', 'PIL.TiffImagePlugin'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"type": "picture", "width": 0, "height": 1}',
        b'{"type": "picture", "width": 1, "height": 1, "more": 1}',
        b'{"type": "decoded", "fps": NaN}',
        b'{"type": "refused", "code": "no such code", "words": ""}',
        b'{"type": "refused", "code": "media_corrupt", "words": "' + b"x" * 501 + b'"}',
        b'{"type": "__reduce__"}',
    ],
)
def test_a_reply_that_is_none_is_not_taken(body: bytes) -> None:
    with pytest.raises(ValidationError):
        read_reply(body)


def test_a_message_is_small_whatever_it_says() -> None:
    assert len(encode(PictureHeader(width=1 << 40, height=1 << 40))) < MAX_MESSAGE_BYTES
    file = io.BytesIO(encode(PictureHeader(width=3, height=2)))
    file.seek(4)
    assert read_reply(file.read()) == PictureHeader(width=3, height=2)
