"""What the settings say about webhooks, and what a job's webhook must keep to before the job is taken."""

from __future__ import annotations

from dataclasses import dataclass

import redis.asyncio

from api_stub.contract.job import Job
from api_stub.gateway.keys import KeyRing
from api_stub.gateway.metrics import Metrics
from api_stub.gateway.outbound import TargetPolicy, TargetRefused, parse_networks, parse_ports
from api_stub.gateway.problems import invalid
from api_stub.gateway.webhooks.post import WebhookPost
from api_stub.gateway.webhooks.sender import WebhookSender
from api_stub.ledger.deliveries import DeliveryQueue
from api_stub.settings import GatewaySettings, parsed


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
