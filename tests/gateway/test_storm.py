"""Readers that are cut again and again, by themselves and by a killed gateway, all read the whole text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.storm import Start, storm
from tests.gateway.test_process import STOP_S, ApiProcess

pytestmark = pytest.mark.check

NUM_READERS = 150
NUM_JOBS = 15


@pytest.fixture
def start_at(redis_url: str, tmp_path: Path) -> Iterator[Start]:
    started: list[ApiProcess] = []

    def start(port: int) -> ApiProcess:
        started.append(ApiProcess(redis_url, port, tmp_path / "api.log"))
        return started[-1]

    yield start
    for api in started:
        api.process.kill()
        api.process.wait(STOP_S)


def test_every_reader_of_a_storm_reads_the_whole_text(redis_url: str, start_at: Start) -> None:
    seen = storm(redis_url, start_at, NUM_READERS, NUM_JOBS)
    assert seen.num_whole == NUM_READERS
    assert seen.num_breaks >= NUM_READERS / 2  # the killed gateway was felt
    assert seen.num_cuts >= NUM_READERS
