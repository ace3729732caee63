"""Every file of the corpus through the media layer: a right answer or a coded error, in bounded time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.corpus.run import INTERNAL, POLICY, all_cases, run
from tests.corpus.traps import set_traps
from tests.decoding import LIMITS
from tests.servers import S3Server
from worker.media.decoders import FFMPEG_ENVIRONMENT, Decoders

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

AT_ONCE = 2
#: A picture arrives as 3 bytes per pixel and is kept as 4.
PEAK_BYTES_PER_PIXEL = 7
#: What serving requests and holding small pictures adds.
SLACK_BYTES = 100 << 20


def test_the_corpus_is_survived(s3_server: S3Server, s3_client: S3Client, tmp_path: Path) -> None:
    decoders = Decoders(AT_ONCE, LIMITS)
    with set_traps(tmp_path) as traps:
        cases = all_cases(traps)
        assert len({case.name for case in cases}) == len(cases) >= 500
        handles_before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - Path.iterdir holds one of its own
        try:
            report = run(cases, decoders, s3_client, s3_server.url, AT_ONCE)
            assert len(decoders.pids) <= AT_ONCE
        finally:
            decoders.close()
        sys.stdout.write(f"\n{report}\n")
        assert not [(one.case.name, one.words) for one in report.handled if one.outcome == INTERNAL]
        assert not [(one.case.name, one.outcome, one.words, one.colour) for one in report.handled if not one.is_right]
        assert report.grown_bytes < AT_ONCE * POLICY.max_image_pixels * PEAK_BYTES_PER_PIXEL + SLACK_BYTES
        assert report.decoder_bytes < LIMITS.memory_bytes
        assert report.seconds(1.0) < LIMITS.image_s + LIMITS.video_s
        assert (traps.num_connections, traps.num_openings) == (0, 0)
        traps.secret.read_text()
        assert traps.num_openings > 0, "the trap works"
    assert not [name for name in os.listdir(tempfile.gettempdir()) if name.startswith(f"visionq-media-{os.getpid()}-")]  # noqa: PTH208
    assert len(os.listdir("/proc/self/fd")) <= handles_before + AT_ONCE, "but for sockets to S3"  # noqa: PTH208
    assert not [pid for pid in decoders.pids if Path(f"/proc/{pid}").exists()]


OPEN_IT = """
import sys, cv2
capture = cv2.VideoCapture(sys.argv[1], cv2.CAP_FFMPEG)
print(capture.isOpened(), capture.grab())
"""


def test_ffmpeg_left_to_itself_opens_what_a_list_names_and_ours_does_not(tmp_path: Path) -> None:
    with set_traps(tmp_path) as traps:
        path = tmp_path / "list"
        path.write_text(f"ffconcat version 1.0\nfile '{traps.secret.name}'\n")
        command = [sys.executable, "-c", OPEN_IT, str(path)]
        subprocess.run(command, timeout=60, check=True, capture_output=True)
        assert traps.num_openings > 0
        environment = os.environ | FFMPEG_ENVIRONMENT
        done = subprocess.run(command, timeout=60, check=True, capture_output=True, env=environment)
        assert traps.num_openings == 0
        assert done.stdout.split() == [b"False", b"False"]
