"""Takes deliveries that are due from the ledger and tries each: arrived, tried again later, or given up.

Every gateway process has a sender; the ledger's lease sees to it that one delivery is tried by one of them at a time.
`WebhookRules` is what the settings say, and what a job's webhook must keep to before the job is taken.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit

import redis
import redis.asyncio

from api_stub.contract.event import parse_event
from api_stub.contract.job import Job
from api_stub.gateway.keys import KeyRing
from api_stub.gateway.metrics import Metrics
from api_stub.gateway.problems import invalid
from api_stub.gateway.signature import Secret, signed_headers
from api_stub.gateway.ssrf import TargetPolicy, TargetRefused, parse_networks, parse_ports
from api_stub.gateway.webhooks.post import PostFailed, PostResponse, WebhookPost
from api_stub.ledger.outbox import Delivery, DeliveryQueue, Settlement
from api_stub.settings import GatewaySettings, parsed

logger = logging.getLogger(__name__)

MAX_SENDING: Final = 32
#: One slow receiver must not hold all of them.
MAX_PER_HOST: Final = 4
POLL_S: Final = 0.5
#: How much longer than its time limit a try's lease lasts.
LEASE_MARGIN_S: Final = 5.0
#: Delays are lengthened by up to this share, so that receivers that came back are not met by everybody at once.
JITTER: Final = 0.2
MAX_RETRY_AFTER_S: Final = 86_400.0
STOP_S: Final = 3.0


class WebhookSender:
    """`start()` and `close()` on the loop that runs it. `delays_s`: pauses before the second, third, … try."""

    def __init__(
        self,
        queue: DeliveryQueue,
        post: WebhookPost,
        secrets_of: Callable[[str], Sequence[Secret]],
        delays_s: Sequence[float],
        timeout_s: float,
        metrics: Metrics,
    ) -> None:
        self._queue, self._post, self._secrets_of, self._metrics = queue, post, secrets_of, metrics
        self._delays_s = tuple(delays_s)
        self._lease_s = timeout_s + LEASE_MARGIN_S
        self._sending: set[asyncio.Task[None]] = set()
        self._hosts: Counter[str] = Counter()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send."""
        self._loop = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop. Tries that do not end soon are left to the next gateway."""
        if self._loop is not None:
            self._loop.cancel()
            with suppress(asyncio.CancelledError):
                await self._loop
        if self._sending:
            await asyncio.wait(self._sending, timeout=STOP_S)
        for task in tuple(self._sending):
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                num_taken = await self._send_due()
            except redis.RedisError as error:
                logger.warning("due webhooks not read", extra={"action": "webhook", "error": type(error).__name__})
                num_taken = 0
            if not num_taken:
                await asyncio.sleep(POLL_S * random.uniform(1 - JITTER, 1 + JITTER))

    async def _send_due(self) -> int:
        if len(self._sending) >= MAX_SENDING:
            await asyncio.wait(self._sending, return_when=asyncio.FIRST_COMPLETED)
        taken = await self._queue.take(MAX_SENDING - len(self._sending), self._lease_s)
        for delivery in taken:
            task = asyncio.create_task(self._deliver(delivery))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return len(taken)

    async def _deliver(self, delivery: Delivery) -> None:
        host = urlsplit(delivery.url).hostname or ""
        self._hosts[host] += 1
        try:
            await self._try(delivery, is_crowded=self._hosts[host] > MAX_PER_HOST)
        except redis.RedisError as error:
            # Its lease ends and somebody tries it again: it may then arrive twice, with one id.
            logger.warning(
                "outcome of a webhook not recorded", extra=_facts(delivery) | {"error": type(error).__name__}
            )
        except Exception:
            logger.exception("webhook failed unexpectedly", extra=_facts(delivery))
        finally:
            self._hosts[host] -= 1
            if not self._hosts[host]:
                del self._hosts[host]

    async def _try(self, delivery: Delivery, *, is_crowded: bool) -> None:
        if is_crowded:
            await self._queue.settle(delivery, Settlement.LATER, delay_s=random.uniform(0.5, 1.5))
            return
        if delivery.is_gone:
            await self._give_up(delivery, Settlement.GIVEN_UP, "its address has answered 410 Gone")
            return
        secrets = self._secrets_of(delivery.tenant)
        if not secrets:
            await self._failed(delivery, "there is no secret to sign with")
            return
        body = body_of(delivery)
        headers = {"content-type": "application/json", "user-agent": "visionq"}
        headers |= signed_headers(delivery.id, int(time.time()), body, secrets)
        try:
            answer = await self._post.send(delivery.url, headers, body)
        except TargetRefused as error:
            await self._give_up(delivery, Settlement.GIVEN_UP, f"refused: {error}")
        except PostFailed as error:
            await self._failed(delivery, str(error))
        else:
            await self._answered(delivery, answer)

    async def _answered(self, delivery: Delivery, answer: PostResponse) -> None:
        if answer.is_good:
            await self._queue.settle(delivery, Settlement.DELIVERED)
            self._metrics.webhook(Settlement.DELIVERED)
            logger.info("webhook delivered", extra=_facts(delivery))
        elif answer.status == HTTPStatus.GONE:
            await self._give_up(delivery, Settlement.GONE, "410 Gone")
        else:
            await self._failed(delivery, f"status {answer.status}", answer.retry_after_s or 0.0)

    async def _failed(self, delivery: Delivery, reason: str, at_least_s: float = 0.0) -> None:
        if delivery.tries > len(self._delays_s):
            await self._give_up(delivery, Settlement.GIVEN_UP, reason)
            return
        delay_s = self._delays_s[delivery.tries - 1] * random.uniform(1, 1 + JITTER)
        delay_s = max(delay_s, min(at_least_s, MAX_RETRY_AFTER_S))
        await self._queue.settle(delivery, Settlement.AGAIN, delay_s=delay_s)
        self._metrics.webhook(Settlement.AGAIN)
        logger.info(
            "webhook failed, tried again later", extra=_facts(delivery) | {"reason": reason, "delay_s": round(delay_s)}
        )

    async def _give_up(self, delivery: Delivery, settlement: Settlement, reason: str) -> None:
        await self._queue.settle(delivery, settlement, reason=reason)
        self._metrics.webhook(settlement)
        logger.warning("webhook given up", extra=_facts(delivery) | {"reason": reason})


def body_of(delivery: Delivery) -> bytes:
    """Return what is sent: the event behind its type and time. The same bytes at every try."""
    moment = datetime.fromtimestamp(parse_event(delivery.event).ts, UTC).isoformat(timespec="milliseconds")
    kind, timestamp = json.dumps(delivery.type), json.dumps(moment.replace("+00:00", "Z"))
    return f'{{"type":{kind},"timestamp":{timestamp},"data":{delivery.event}}}'.encode()


def _facts(delivery: Delivery) -> dict[str, object]:
    return {
        "action": "webhook",
        "job_id": delivery.job_id,
        "delivery": delivery.id,
        "event": delivery.type,
        "tries": delivery.tries,
    }


@dataclass(frozen=True, slots=True)
class WebhookRules:
    """Where webhooks may go, and how often one is tried."""

    policy: TargetPolicy
    delays_s: tuple[float, ...]

    @classmethod
    def load(cls, settings: GatewaySettings) -> WebhookRules:
        """Read the settings. Raises InvalidSettings."""
        policy = TargetPolicy(
            allow_http=settings.webhook_allow_http,
            ports=parsed("webhook_ports", settings.webhook_ports, parse_ports),
            networks=parsed("webhook_allow_networks", settings.webhook_allow_networks, parse_networks),
        )
        return cls(policy, parsed("webhook_delays_s", settings.webhook_delays_s, _delays))

    def check(self, job: Job, keys: KeyRing) -> None:
        """Raise Problem (422) when the job has a webhook that would never be sent."""
        if job.webhook is None:
            return
        try:
            self.policy.check_url(str(job.webhook.url))
        except TargetRefused as error:
            raise invalid("webhook.url", str(error)) from error
        if not keys.webhook_secrets(job.tenant):
            raise invalid("webhook", "this gateway has no secret to sign it with")

    def sender(
        self, settings: GatewaySettings, keys: KeyRing, commands: redis.asyncio.Redis, metrics: Metrics
    ) -> WebhookSender:
        """Make the sender that keeps to these rules."""
        queue = DeliveryQueue(commands, settings.ledger)
        post = WebhookPost(self.policy, settings.webhook_timeout_s)
        return WebhookSender(queue, post, keys.webhook_secrets, self.delays_s, settings.webhook_timeout_s, metrics)


def _delays(text: str) -> tuple[float, ...]:
    delays = tuple(float(word) for word in text.split(",") if word.strip())
    if not all(0 <= delay <= 7 * 86_400 for delay in delays) or len(delays) > 50:
        raise ValueError("at most 50 pauses of 0 to 604800 seconds")
    return delays
