"""What the log says of a message that a worker puts back on purpose."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from celery.exceptions import Reject

from worker.broker.app import without_rejections

LOGGER = logging.getLogger("celery.app.trace")


@pytest.fixture(autouse=True)
def filtered() -> Iterator[None]:
    LOGGER.addFilter(without_rejections)
    yield
    LOGGER.removeFilter(without_rejections)


def run(error: Exception) -> None:
    """Run a task that raises `error` as Celery's workers do."""
    app = Celery("test", broker="memory://", set_as_current=False)

    @app.task(name="fails", ignore_result=True, shared=False)
    def fails() -> None:
        raise error

    build_tracer(fails.name, fails, app=app)("1", (), {}, {"id": "1"})


def test_a_message_put_back_leaves_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    run(Reject(reason="draining", requeue=True))
    assert not caplog.records


def test_a_broken_task_is_told_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    run(ValueError("broken"))
    (record,) = caplog.records
    assert record.exc_info is not None
