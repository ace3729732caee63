"""Every name that crosses a boundary: Celery tasks and queues, Redis keys and channels, message headers.

Strings only, no I/O. CONTRACT v1: a change here is a change for every producer in every language.
"""

from __future__ import annotations

import re
from typing import Final

PREFIX: Final = "visionq:"
DEFAULT_MODEL_NAME: Final = "default"
#: Routes fine-tuning; no model is served under it.
TRAINING_MODEL_NAME: Final = "training"
MODEL_NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,62}$"
#: What a job may give as its model: a model's name, or `NAME:ADAPTER` for one of its adapters.
REQUESTED_MODEL_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,62}(:[a-z0-9][a-z0-9._-]{0,62})?$"

#: Celery header that marks a message as a doorbell: the job itself is already in the ledger.
DOORBELL_HEADER: Final = "visionq-doorbell"

#: kombu's Redis transport keeps one list per priority step; a priority goes to the highest step not above it.
PRIORITY_STEPS: Final = (0, 3, 6, 9)
PRIORITY_SEPARATOR: Final = "\x06\x16"

# Ledger keys. All of them live in one Redis database.
DUE_KEY: Final = PREFIX + "due"  # ZSET job id -> Redis time at which a reaper must look at the job
DEAD_KEY: Final = PREFIX + "dead"  # LIST of ids of jobs that were given up because their workers kept dying
FENCE_KEY: Final = PREFIX + "fence"  # counter: one number per claim, never reused
SUBMITTED_KEY: Final = PREFIX + "submitted"  # counter: one number per doorbell, for the lost-doorbell watermark
LISTS_KEY: Final = PREFIX + "lists"  # SET of `<model>:<priority step>` with waiting jobs: what 0.1.0's sweeps look at
NEWS_KEY: Final = PREFIX + "news"  # ZSET `<model>:<priority step>` -> Redis time of the news, for the next sweep
SERVING_KEY: Final = PREFIX + "serving"  # ZSET model -> Redis time at which its last worker's silence is too long
KNOWN_KEY: Final = PREFIX + "known"  # ZSET model -> Redis time at which a worker last served or loaded it
UNSERVED_KEY: Final = PREFIX + "unserved"  # ZSET job id -> Redis time at which a reaper asks who serves its model
SWEEP_KEY: Final = PREFIX + "sweep"  # Redis time of the last sweep, for as long as its process need not sweep again
WATCH_KEY: Final = PREFIX + "watch"  # HASH at, seconds: how long Redis answered, the clock of leases; time, ahead: now
COUNTS_KEY: Final = PREFIX + "counts"  # HASH of ledger counters (claims, reaped leases, rung bells, ...)
TURN_KEY: Final = PREFIX + "turn"  # counter: one number per turn of a tenant
NUM_HELD_KEY: Final = PREFIX + "num_held"  # HASH `<model>:<priority step>` -> number of jobs held back
PAUSED_KEY: Final = PREFIX + "paused"  # HASH model -> Redis time at which an operator paused its queue
LEASES_KEY: Final = (
    PREFIX + "leases"
)  # ZSET lease in seconds -> Redis time until which a worker that counts it is alive
SETTINGS_KEY: Final = PREFIX + "settings"  # ZSET `name=value …` -> Redis time until which a reaper with these is alive
DELIVERIES_KEY: Final = PREFIX + "webhooks"  # ZSET delivery id -> Redis time at which a gateway may try it
GIVEN_UP_KEY: Final = PREFIX + "webhooks_given_up"  # LIST of JSON: deliveries that are not tried again, newest first
LINKED_KEY: Final = PREFIX + "linked"  # ZSET id of a job with links -> Redis time at which a worker must look at it
PROBE_KEY: Final = PREFIX + "probe"  # never there: readiness probes write to it on that condition
CANCEL_CHANNEL: Final = PREFIX + "cancel"  # pub/sub: ids of running jobs that were asked to stop

_MODEL_NAME = re.compile(MODEL_NAME_PATTERN)
_REQUESTED_MODEL = re.compile(REQUESTED_MODEL_PATTERN)


def is_model_name(name: str) -> bool:
    """Tell whether `name` may route jobs (it becomes part of queue and key names)."""
    return _MODEL_NAME.fullmatch(name) is not None  # `$` alone would let a last new line through


def is_requested_model(name: str) -> bool:
    """Tell whether `name` is a model's name or `NAME:ADAPTER`."""
    return _REQUESTED_MODEL.fullmatch(name) is not None


def split_model(name: str) -> tuple[str, str]:
    """Return the model's name, which routes a job, and the adapter's, which is empty for the base alone."""
    model, _, adapter = name.partition(":")
    return model, adapter


def queue_model(name: str) -> str:
    """Return the model's name of `NAME` or `NAME:ADAPTER`: the adapters of a model share its queue."""
    return split_model(name)[0]


def queue(model: str) -> str:
    """Return the Celery queue that carries jobs for the model name `model`."""
    return f"visionq.{model}"


def model_of_queue(queue_name: str) -> str:
    """Return the model name served by a Celery queue. Raises ValueError for a foreign queue."""
    prefix, _, model = queue_name.partition(".")
    if prefix != "visionq" or not is_model_name(model):
        raise ValueError(f"not a visionq queue: {queue_name!r}")
    return model


def priority_step(priority: int) -> int:
    """Return the priority list that a priority (0 first … 9 last) lands in."""
    return max(step for step in PRIORITY_STEPS if step <= priority)


def queue_list(model: str, step: int) -> str:
    """Return the Redis list in which kombu keeps the messages of one priority step of a queue."""
    return queue(model) if step == 0 else f"{queue(model)}{PRIORITY_SEPARATOR}{step}"


def job_key(job_id: str) -> str:
    """HASH: the job's row in the ledger."""
    return f"{PREFIX}job:{job_id}"


def events_key(job_id: str) -> str:
    """Name of both the pub/sub channel and the replay stream of a job's events."""
    return f"{PREFIX}events:{job_id}"


def depth_key(model: str) -> str:
    """Counter of queued and in-progress jobs; an autoscaler may read it."""
    return f"{PREFIX}depth:{model}"


def workers_key(model: str) -> str:
    """ZSET worker name -> Redis time until which it counts as alive."""
    return f"{PREFIX}workers:{model}"


def serves_key(model: str) -> str:
    """HASH worker name -> JSON of what it serves, of the workers that beat."""
    return f"{PREFIX}serves:{model}"


def wanted_key(model: str) -> str:
    """JSON of what operators want the model's workers to serve."""
    return f"{PREFIX}wanted:{model}"


def turn_of_change_key(model: str) -> str:
    """Name of the worker that changes what it serves at the moment: one at a time."""
    return f"{PREFIX}turn_of_change:{model}"


def list_id(model: str, step: int) -> str:
    """Return how the ledger names one priority list of a model's queue."""
    return f"{model}:{step}"


def waiting_key(list_id: str) -> str:
    """ZSET job id -> number of its doorbell: the queued jobs whose doorbell should be in the list."""
    return f"{PREFIX}waiting:{list_id}"


def jobs_key(tenant: str) -> str:
    """ZSET job id -> Redis time of its submission: a tenant's jobs, as long as their rows are kept."""
    return f"{PREFIX}jobs:{tenant}"


def held_key(list_id: str, tenant: str) -> str:
    """ZSET job id -> its place in the line: a tenant's queued jobs whose doorbells are held back."""
    return f"{PREFIX}held:{list_id}:{tenant}"


def turns_key(list_id: str) -> str:
    """ZSET tenant -> number of its turn: the tenants with held jobs that may be rung, the next one first."""
    return f"{PREFIX}turns:{list_id}"


def tenants_key(model: str) -> str:
    """HASH tenant -> number of its jobs that run or whose doorbells are out."""
    return f"{PREFIX}tenants:{model}"


def strange_key(tenant: str) -> str:
    """ZSET model -> Redis time of a submit: the names of a tenant's jobs that no worker has served."""
    return f"{PREFIX}strange:{tenant}"


def suspects_key(worker: str) -> str:
    """SET of ids of the jobs that a worker runs and that lost a worker before."""
    return f"{PREFIX}suspects:{worker}"


def aged_key(model: str) -> str:
    """Id of the job that was last let in front because it had waited long."""
    return f"{PREFIX}aged:{model}"


def delivery_key(delivery_id: str) -> str:
    """HASH: one event on its way to a webhook."""
    return f"{PREFIX}webhook:{delivery_id}"


def gone_key(digest: str) -> str:
    """Set for a while when a webhook's address answered that it is gone; by SHA-1 of tenant, space, address."""
    return f"{PREFIX}webhook_gone:{digest}"


def watermark_key(list_id: str) -> str:
    """Highest submission number claimed so far from one priority list of a queue."""
    return f"{PREFIX}watermark:{list_id}"


def result_key(job_id: str) -> str:
    """Key (and pub/sub channel) of the Celery result backend."""
    return f"celery-task-meta-{job_id}"
