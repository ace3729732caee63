"""What an error of Redis means: may the same command succeed later, is this the wrong server, or will it fail again.

Judged by the class that redis-py raised and by the code that leads the server's reply, never by words in its text:
since Redis 7 an error inside a script keeps its own code, and a text may hold a user's words. Knows no connection.

Only in three places does a code stand behind something else, each with a grammar of its own: Redis 6.2 wraps errors of
scripts, a script that hands on an error which it caught makes it a text behind ERR, and EXEC says what discarded it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from redis import exceptions


class Verdict(StrEnum):
    """What follows from an error.

    PASSING: the same command may succeed later, over any connection. WRONG_SERVER: it may succeed later, and not over
    this connection as long as it leads to a server that is no writable master. LASTING: it would fail again.
    """

    PASSING = "passing"
    WRONG_SERVER = "wrong_server"
    LASTING = "lasting"


#: By the first word of an error reply. Sources: Redis 6.2 to 7.4 and Valkey 9 (`createSharedObjects` in server.c, and
#: the replies of the modules beside it). A code that is not here is judged by its class, at last as lasting.
CODES: Final[Mapping[str, Verdict]] = MappingProxyType(
    dict.fromkeys(
        (
            "READONLY",  # a replica, also one that was master until a moment ago
            "MASTERDOWN",  # a replica without its master
            "UNBLOCKED",  # became a replica while a blocking command waited
            "LOADING",  # has just been started, or follows another master anew
            "REDIRECT",  # a Valkey replica that names its master
        ),
        Verdict.WRONG_SERVER,
    )
    | dict.fromkeys(
        (
            "OOM",  # full
            "BUSY",  # a script runs for too long
            "NOREPLICAS",  # fewer than `min-replicas-to-write`
            "MISCONF",  # cannot write its files
            "NOSCRIPT",  # forgot the script; the next call brings it along
            "TRYAGAIN",
            "CLUSTERDOWN",
            "NOMASTERLINK",
            "INPROG",  # a failover is under way
            "IOERR",
            # Met while connecting, so the command itself was not refused: a password is being changed, or a server has
            # come back without its users.
            "NOAUTH",
            "WRONGPASS",
        ),
        Verdict.PASSING,
    )
    | dict.fromkeys(
        (
            "WRONGTYPE",
            "NOPERM",
            "EXECABORT",
            "CROSSSLOT",
            "MOVED",  # Redis Cluster, which nothing here can use
            "ASK",
            "NOPROTO",
            "DENIED",  # protected mode
            "BUSYGROUP",
            "BUSYKEY",
            "NOGROUP",
            "NOTBUSY",
            "UNKILLABLE",
            "INVALIDOBJ",
            "NOGOODSLAVE",
            "NOQUORUM",
        ),
        Verdict.LASTING,
    )
)

#: Every class of redis-py, for errors whose code says nothing: a subclass that is not here is judged as its base.
CLASSES: Final[Mapping[type[BaseException], Verdict]] = MappingProxyType(
    dict.fromkeys(
        (
            exceptions.ConnectionError,
            exceptions.TimeoutError,
            exceptions.AuthenticationError,
            exceptions.AuthenticationWrongNumberOfArgsError,  # an old server, or one that is asked for a user by name
            exceptions.AuthorizationError,
            exceptions.ExternalAuthProviderError,
            exceptions.MaxConnectionsError,
            exceptions.NoScriptError,
            exceptions.OutOfMemoryError,
            exceptions.TryAgainError,
            exceptions.ClusterDownError,
            exceptions.WatchError,  # somebody else was faster
        ),
        Verdict.PASSING,
    )
    | dict.fromkeys(
        (exceptions.BusyLoadingError, exceptions.ReadOnlyError, exceptions.MasterDownError), Verdict.WRONG_SERVER
    )
    | dict.fromkeys(
        (
            exceptions.RedisError,
            exceptions.ResponseError,
            exceptions.InvalidResponse,
            exceptions.DataError,
            exceptions.PubSubError,
            exceptions.ExecAbortError,
            exceptions.NoPermissionError,
            exceptions.ModuleError,
            exceptions.LockError,
            exceptions.LockNotOwnedError,
            exceptions.ChildDeadlockedError,
            exceptions.RedisClusterException,
            exceptions.ClusterError,
            exceptions.AskError,
            exceptions.MovedError,
            exceptions.ClusterCrossSlotError,
            exceptions.SlotNotCoveredError,
            exceptions.CrossSlotTransactionError,
            exceptions.InvalidPipelineStack,
            exceptions.IncorrectPolicyType,
        ),
        Verdict.LASTING,
    )
)

_WORD: Final = r"([A-Z][A-Z0-9]+)(?: |$)"
_LEADING: Final = re.compile(_WORD)
#: redis-py puts the command in front of an error that a pipeline met; only the last of these phrases is its own.
_PIPELINE: Final = re.compile(r"Command # \d+ \(.*\) of pipeline caused error: ", re.DOTALL)
#: Redis 6.2. Its error handler says where the script was, then the engine where it refused a command, with a dash
#: before the code; a command's own refusal (WRONGTYPE) has neither. `script:line: ` without @ begins what a script says
#: itself, behind which only the engine's dash proves a code.
_WRAPPED: Final = re.compile(
    r"Error running script \(call to f_[0-9a-f]{40}\): @user_script:\d+: "
    rf"(?:(?:user_script:\d+: )?(?:@user_script: \d+|=\[C\]: -1): -)?{_WORD}"
)
#: Redis 6.2, when a script returns the error that it caught.
_RETURNED: Final = re.compile(rf"@user_script: \d+: -{_WORD}")
#: Redis 7 and Valkey, when a script hands on the text of an error that it caught: `error(problem, 0)`.
_HANDED_ON: Final = re.compile(rf"{_WORD}.*script: (?:[0-9a-f]{{40}}, )?on @user_script:\d+\.\Z", re.DOTALL)
_DISCARDED: Final = re.compile(rf"Transaction discarded because of: {_WORD}")


def judge(error: BaseException) -> Verdict:
    """Return what an error of redis-py means."""
    code = code_of(error)
    if code is not None and code in CODES:
        return CODES[code]
    return next((CLASSES[kind] for kind in type(error).__mro__ if kind in CLASSES), Verdict.LASTING)


def is_passing(error: BaseException) -> bool:
    """Tell whether the same command may succeed later; a script that fails by itself never will."""
    return judge(error) is not Verdict.LASTING


def code_of(error: BaseException) -> str | None:
    """Return the code of the server's reply, of an error inside a script the innermost; None: no server said this."""
    if not isinstance(error, exceptions.RedisError):
        return None
    outer = error.status_code
    if outer == "ERR":
        return _known(_inner(error, _WRAPPED, _HANDED_ON)) or outer
    if outer == "EXECABORT":
        return _inner(error, _DISCARDED) or outer
    if outer is None and isinstance(error, exceptions.ResponseError):
        return _inner(error, _LEADING, _RETURNED)  # redis-py leaves codes that it does not know in the text
    return outer


def _inner(error: exceptions.RedisError, *grammars: re.Pattern[str]) -> str | None:
    words = str(error.args[0]) if error.args else ""
    if (prefix := _PIPELINE.match(words)) is not None:
        words = words[prefix.end() :]
    found = next((match for grammar in grammars if (match := grammar.match(words)) is not None), None)
    return None if found is None else found.group(1)


def _known(code: str | None) -> str | None:
    return code if code in CODES else None
