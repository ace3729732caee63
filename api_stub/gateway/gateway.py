"""What the routes work with: settings, keys, ledger, storage, readers; made once per process.

boto3 blocks, so it runs in threads, a bounded number at a time. The reaper has its own thread and ledger.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

import redis.asyncio
from anyio import CapacityLimiter, to_thread

from api_stub import connections
from api_stub.contract.job import Job
from api_stub.contract.names import queue_model
from api_stub.gateway.abandoned import Abandoned
from api_stub.gateway.broadcaster import EventBroadcaster
from api_stub.gateway.keys import KeyRing, Limits
from api_stub.gateway.metrics import Metrics
from api_stub.gateway.queues import Queues
from api_stub.gateway.reader import EventReaders
from api_stub.gateway.remote_media import RemoteFetcher, RemoteRules
from api_stub.gateway.webhooks.sender import WebhookRules, WebhookSender
from api_stub.ledger.aio import AsyncLedger
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.reaper import Reaper
from api_stub.settings import GatewaySettings
from api_stub.storage import Storage
from api_stub.submit import submit_errors

T = TypeVar("T")

MAX_STORING: Final = 8
#: When a thousand readers come back at once, the loop is busy for seconds: Redis' answers wait meanwhile, and so do the
#: commands behind them.
COMMAND_S: Final = 5.0
MAX_WAIT_S: Final = 30.0
REAPER_STOP_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Gateway:
    """One process' connections. `open()` and `close()` on the loop that uses it."""

    settings: GatewaySettings
    keys: KeyRing
    metrics: Metrics
    commands: redis.asyncio.Redis
    ledger: AsyncLedger
    broadcaster: EventBroadcaster
    readers: EventReaders
    abandoned: Abandoned
    queues: Queues
    limits: Limits
    storage: Storage
    remote: RemoteFetcher
    webhook_rules: WebhookRules
    _webhooks: WebhookSender
    _reaper: _ReaperThread
    _subscriptions: redis.asyncio.Redis
    #: Apart from `commands`, whose connections may all be busy.
    prober: redis.asyncio.Redis
    _storing: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MAX_STORING))

    @classmethod
    async def open(cls, settings: GatewaySettings, keys: KeyRing, metrics: Metrics) -> Gateway:
        """Make everything; connections are opened on first use, so an absent Redis is no reason to fail."""
        url = settings.redis_url.get_secret_value()
        commands = connections.async_commands(url, timeout_s=COMMAND_S, max_wait_s=MAX_WAIT_S)
        subscriptions = connections.async_readers(url)
        ledger = AsyncLedger(commands, settings.ledger)
        rules = WebhookRules.load(settings)
        broadcaster = EventBroadcaster(subscriptions)
        gateway = cls(
            settings=settings,
            keys=keys,
            metrics=metrics,
            commands=commands,
            ledger=ledger,
            broadcaster=broadcaster,
            readers=EventReaders(ledger, broadcaster),
            abandoned=Abandoned(commands, ledger, settings.api_keep_abandoned_s),
            queues=Queues(commands, ledger, settings.known_models),
            limits=Limits(commands),
            storage=await asyncio.to_thread(Storage, settings),
            remote=RemoteFetcher(RemoteRules.load(settings)),
            webhook_rules=rules,
            _webhooks=rules.sender(settings, keys, commands, metrics),
            _reaper=_ReaperThread(settings),
            _subscriptions=subscriptions,
            prober=connections.async_commands(url),
        )
        broadcaster.start()
        gateway._reaper.start()
        if keys.can_sign:  # else they are left to a gateway that can
            gateway._webhooks.start()
        return gateway

    async def close(self) -> None:
        """Close everything. Readers that are still open end."""
        await self.broadcaster.close()
        await self.abandoned.close()
        await self._webhooks.close()
        await asyncio.to_thread(self._reaper.stop)
        await self._subscriptions.aclose()
        await self.prober.aclose()
        await self.commands.aclose()
        self.storage.close()

    async def submit(self, job_id: str, job: Job) -> None:
        """Hand in a job. The same id and body again is the same job.

        Raises InvalidRequest (the id belongs to another body), QueueFull, StoreUnavailable.
        """
        with submit_errors():
            await self.ledger.submit(job_id, job)
        self.metrics.submitted(queue_model(job.model))

    async def in_storage(self, call: Callable[[], T]) -> T:
        """Run a call of `storage` in a thread."""
        return await to_thread.run_sync(call, limiter=self._storing)


class _ReaperThread:
    """The ledger's reaper, as long as the gateway runs."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._ledger = Ledger.connect(settings.redis_url.get_secret_value(), settings.ledger)
        self._stop = threading.Event()
        reaper = Reaper(self._ledger, settings.sweep_s)
        self._thread = threading.Thread(target=reaper.run, args=(self._stop,), name="reaper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(REAPER_STOP_S)
        self._ledger.close()
