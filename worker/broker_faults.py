"""What an error of kombu means, in the words of the ledger's verdicts; errors of redis-py are judged there.

kombu passes most of redis-py's errors on unchanged and wraps some into its own: then what is behind it decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import redis
from kombu import exceptions

from api_stub.ledger import verdicts
from api_stub.ledger.verdicts import Verdict

#: Every class of kombu.exceptions. Classes of the operating system and subclasses that are not here: as their base.
CLASSES: Final[Mapping[type[BaseException], Verdict]] = MappingProxyType(
    dict.fromkeys(
        (
            OSError,
            exceptions.TimeoutError,
            exceptions.OperationalError,
            exceptions.ConnectionError,
            exceptions.InconsistencyError,  # the queue's binding was lost; whoever connects anew makes it
            exceptions.LimitExceeded,
            exceptions.ConnectionLimitExceeded,
            exceptions.ChannelLimitExceeded,
        ),
        Verdict.PASSING,
    )
    | dict.fromkeys(
        (
            exceptions.KombuError,
            exceptions.NotBoundError,
            exceptions.MessageStateError,
            exceptions.ChannelError,
            exceptions.ResourceError,
            exceptions.VersionMismatch,
            exceptions.SerializerNotInstalled,
            exceptions.ContentDisallowed,
            exceptions.SerializationError,
            exceptions.EncodeError,
            exceptions.DecodeError,
            exceptions.HttpError,
        ),
        Verdict.LASTING,
    )
)


def judge(error: BaseException) -> Verdict:
    """Return what an error of kombu, redis-py or a socket means."""
    if isinstance(error, redis.RedisError):
        return verdicts.judge(error)
    if isinstance(error, exceptions.OperationalError) and error.__cause__ is not None:
        return judge(error.__cause__)
    return next((CLASSES[kind] for kind in type(error).__mro__ if kind in CLASSES), Verdict.LASTING)


def is_of_connection(error: BaseException) -> bool:
    """Tell whether an error came from the broker's side, and so says nothing about the message at hand."""
    return isinstance(error, redis.RedisError) or judge(error) is not Verdict.LASTING
