"""What errors of Redis mean, asked of real servers in every state in which they refuse something."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import redis.asyncio
from redis import exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from api_stub.ledger.verdicts import CLASSES, CODES, Verdict, code_of, is_passing, judge
from tests.servers import TESTED, RedisServer, eventually, free_port

PASSING, WRONG_SERVER, LASTING = Verdict.PASSING, Verdict.WRONG_SERVER, Verdict.LASTING
#: The oldest and the newest, whatever else is tested: the difference between them is what this is about.
NAMES = sorted({"oldest", "newest", TESTED})
ONCE = Retry(NoBackoff(), 0)
#: Small enough to be refused by every server, whatever else it holds.
FULL = 1
#: Redis 6.2 answers while it loads once in so many bytes.
LOADING_STEP_BYTES = 2 * 1024 * 1024

SET = "redis.call('SET', KEYS[1], 'x')"
SCRIPTS = {
    "called": f"return {SET}",
    "returned": "return redis.pcall('SET', KEYS[1], 'x')",
    "handed on": f"local is_done, problem = pcall(function() {SET} end) if not is_done then error(problem, 0) end",
}


@dataclass(frozen=True)
class Refusing:
    """A server in a state in which it refuses `SET k x`, and how to get it there once more."""

    url: str
    enter: Callable[[], None] = lambda: None
    leave: Callable[[], None] = lambda: None

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, decode_responses=True, socket_timeout=20, retry=ONCE)


State = Callable[[RedisServer, Path], AbstractContextManager[Refusing]]


@pytest.fixture(params=NAMES)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    (tmp_path / "files").mkdir()
    running = RedisServer(tmp_path / "files", "--appendonly", "no", "--logfile", "", name=request.param)
    yield running
    running.kill()


@contextmanager
def configured(server: RedisServer, name: str, value: object, usual: object) -> Iterator[Refusing]:
    with server.client() as client:
        yield Refusing(server.url, lambda: client.config_set(name, value), lambda: client.config_set(name, usual))


def full(server: RedisServer, _: Path) -> AbstractContextManager[Refusing]:
    return configured(server, "maxmemory", FULL, 0)


def short_of_replicas(server: RedisServer, _: Path) -> AbstractContextManager[Refusing]:
    return configured(server, "min-replicas-to-write", 1, 0)


@contextmanager
def read_only(server: RedisServer, _: Path) -> Iterator[Refusing]:
    with server.client() as client:
        yield Refusing(
            server.url,
            lambda: client.execute_command("REPLICAOF", "127.0.0.1", free_port()),
            lambda: client.execute_command("REPLICAOF", "NO", "ONE"),
        )


@contextmanager
def masterless(server: RedisServer, _: Path) -> Iterator[Refusing]:
    """A replica without its master that serves no stale data; it takes no writes either, unless it is told to."""
    with server.client() as client:
        client.config_set("replica-serve-stale-data", "no")
        client.config_set("replica-read-only", "no")
        client.execute_command("REPLICAOF", "127.0.0.1", free_port())
        yield Refusing(server.url)


@contextmanager
def unable_to_save(server: RedisServer, path: Path) -> Iterator[Refusing]:
    with server.client() as client:
        client.set("something", "to save")
        client.config_set("save", "3600 1")
        shutil.rmtree(path / "files")  # the server's own folder
        with suppress(redis.ResponseError):
            client.bgsave()
        eventually(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        yield Refusing(server.url)


@contextmanager
def busy(server: RedisServer, _: Path) -> Iterator[Refusing]:
    def run() -> None:
        with Refusing(server.url).client() as client, suppress(redis.RedisError):
            client.eval("while true do end", 0)

    with server.client() as client:
        client.config_set("lua-time-limit", 50)
        thread = threading.Thread(target=run)
        thread.start()
        eventually(lambda: _is_busy(client))
        yield Refusing(server.url)
        client.script_kill()
        thread.join()


def _is_busy(client: redis.Redis) -> bool:
    try:
        client.get("k")
    except redis.ResponseError:
        return True
    return False


@contextmanager
def loading(server: RedisServer, _: Path) -> Iterator[Refusing]:
    with server.client() as client:
        client.config_set("rdbcompression", "no")
        for number in range(30):
            client.set(f"big:{number}", os.urandom(LOADING_STEP_BYTES))
        client.save()
    server.kill()
    server.launch("--key-load-delay", "400000")
    eventually(lambda: _listens(server.port))
    yield Refusing(server.url)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def another_type(server: RedisServer, _: Path) -> Iterator[Refusing]:
    with server.client() as client:
        client.lpush("k", "x")
        yield Refusing(server.url)


def denied(*rules: str) -> State:
    @contextmanager
    def state(server: RedisServer, _: Path) -> Iterator[Refusing]:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "somebody", "on", ">secret", "+@all", *rules)
        yield Refusing(server.url.replace("redis://", "redis://somebody:secret@"))

    return state


STATES: dict[str, tuple[State, str, Verdict]] = {
    "full": (full, "OOM", PASSING),
    "short of replicas": (short_of_replicas, "NOREPLICAS", PASSING),
    "unable to save": (unable_to_save, "MISCONF", PASSING),
    "busy": (busy, "BUSY", PASSING),
    "read-only": (read_only, "READONLY", WRONG_SERVER),
    "masterless": (masterless, "MASTERDOWN", WRONG_SERVER),
    "loading": (loading, "LOADING", WRONG_SERVER),
    "ACL, keys": (denied("~other"), "NOPERM", LASTING),
}


@pytest.mark.parametrize("name", STATES)
def test_an_error_means_the_same_outside_and_inside_scripts(name: str, server: RedisServer, tmp_path: Path) -> None:
    make, code, verdict = STATES[name]
    with make(server, tmp_path) as refusing, refusing.client() as client:
        refusing.enter()
        said = {"alone": met(lambda: client.set("k", "x"))}
        for way, script in SCRIPTS.items():
            said[way] = met(lambda script=script: client.eval(script, 1, "k"))  # type: ignore[misc]
        with client.pipeline(transaction=False) as pipe:
            said["in a pipeline"] = met(lambda: pipe.set("k", "x").execute())
        said["for asyncio"] = met(lambda: asyncio.run(set_async(refusing.url)))
        refusing.leave()
    assert {way: (code_of(error), judge(error)) for way, error in said.items()} == dict.fromkeys(said, (code, verdict))
    assert {is_passing(error) for error in said.values()} == {verdict is not LASTING}


@pytest.mark.parametrize("name", ["full", "short of replicas", "read-only"])
def test_what_discards_a_transaction_decides(name: str, server: RedisServer, tmp_path: Path) -> None:
    make, code, verdict = STATES[name]
    with make(server, tmp_path) as refusing, refusing.client() as client:
        at_once, at_the_end = (client.pipeline() for _ in range(2))
        at_the_end.connection = connection = client.connection_pool.get_connection()
        for command in (("MULTI",), ("SET", "k", "x")):
            connection.send_command(*command)
            connection.read_response()
        refusing.enter()
        connection.send_command("EXEC")
        said = [met(connection.read_response), met(lambda: at_once.set("k", "x").execute())]
        refusing.leave()
    assert [(code_of(error), judge(error)) for error in said] == [(code, verdict)] * 2


async def set_async(url: str) -> None:
    no_retry = redis.asyncio.retry.Retry(NoBackoff(), 0)
    async with redis.asyncio.Redis.from_url(url, socket_timeout=20, retry=no_retry) as client:
        await client.set("k", "x")


def met(call: Callable[[], object]) -> redis.RedisError:
    """Return the error that a call meets."""
    with pytest.raises(redis.RedisError) as caught:
        call()
    return caught.value


def test_a_wrong_type_lasts(server: RedisServer) -> None:
    with server.client() as client:
        client.lpush("k", "x")
        said = [
            met(lambda: client.get("k")),
            met(lambda: client.eval("return redis.call('GET', KEYS[1])", 1, "k")),
            met(lambda: client.eval("return redis.pcall('GET', KEYS[1])", 1, "k")),
        ]
    assert [(code_of(error), judge(error)) for error in said] == [("WRONGTYPE", LASTING)] * 3


def test_a_command_that_an_acl_denies_lasts(server: RedisServer, tmp_path: Path) -> None:
    with denied("~*", "-set")(server, tmp_path) as refusing, refusing.client() as client:
        said = [met(lambda: client.set("k", "x"))]
        said += [met(lambda script=script: client.eval(script, 1, "k")) for script in SCRIPTS.values()]  # type: ignore[misc]
    assert code_of(said[0]) == "NOPERM"
    assert [judge(error) for error in said] == [LASTING] * 4


CODES_AS_WORDS = "-OOM READONLY LOADING BUSY MASTERDOWN NOREPLICAS"


def test_words_of_users_and_scripts_are_no_codes(server: RedisServer) -> None:
    with server.client() as client:
        client.lpush(CODES_AS_WORDS, "x")
        in_a_key = ") of pipeline caused error: NOREPLICAS x"
        client.lpush(in_a_key, "x")
        said = [
            met(lambda: client.execute_command(CODES_AS_WORDS)),
            met(lambda: client.execute_command("SET", "k", "x", CODES_AS_WORDS)),
            met(lambda: client.eval("return redis.call('SET', KEYS[1], 'x', ARGV[1])", 1, "k", CODES_AS_WORDS)),
            met(lambda: client.eval("return redis.call('GET', KEYS[1])", 1, CODES_AS_WORDS)),
            met(lambda: client.eval("return redis.call(ARGV[1])", 0, CODES_AS_WORDS)),
            met(lambda: client.eval("error(ARGV[1])", 0, CODES_AS_WORDS)),
            met(lambda: client.eval("error('OOM in the words of a script')", 0)),
            met(lambda: client.eval("error('@user_script: 1: OOM in the words of a script')", 0)),
            met(lambda: client.eval("return redis.error_reply(ARGV[1])", 0, f"MINE {CODES_AS_WORDS}")),
            met(lambda: client.eval(f"no Lua {CODES_AS_WORDS}", 0)),
            met(lambda: client.pipeline(transaction=False).get(in_a_key).execute()),
        ]
    assert [judge(error) for error in said] == [LASTING] * len(said)


def test_a_blocking_command_that_outlives_its_master_is_at_the_wrong_server(
    server: RedisServer, tmp_path: Path
) -> None:
    said: list[redis.RedisError] = []
    with read_only(server, tmp_path) as refusing, refusing.client() as client, server.client() as other:
        thread = threading.Thread(target=lambda: said.append(met(lambda: client.brpop(["q"], 20))))
        thread.start()
        eventually(lambda: other.info("clients")["blocked_clients"] == 1)
        refusing.enter()
        thread.join(10)
    assert [(code_of(error), judge(error)) for error in said] == [("UNBLOCKED", WRONG_SERVER)]


def test_a_server_with_too_many_clients_or_another_password_passes(server: RedisServer) -> None:
    with server.client() as client:
        client.ping()
        client.config_set("maxclients", 1)
        said = [met(lambda: Refusing(server.url).client().ping())]
        client.config_set("maxclients", 1000)
        client.config_set("requirepass", "changed")
        said += [met(lambda: Refusing(server.url).client().ping())]
        said += [met(lambda: Refusing(server.url.replace("redis://", "redis://:before@")).client().ping())]
    assert [judge(error) for error in said] == [PASSING] * 3


def test_an_absent_and_a_silent_server_pass() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        redis.Redis(port=silent.getsockname()[1], socket_timeout=0.1, retry=ONCE) as client,
    ):
        said = [met(client.ping)]
    with redis.Redis(port=free_port(), retry=ONCE) as client:
        said.append(met(client.ping))
    assert [(code_of(error), judge(error)) for error in said] == [(None, PASSING)] * 2


#: Newer than the oldest redis-py that is supported, so judged by its base: of a command that nothing here sends.
BY_BASE = {"NoSuchFieldsetError"}


def test_every_class_and_code_of_redis_py_has_a_verdict() -> None:
    classes = {kind for kind in vars(exceptions).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {kind.__name__ for kind in classes - CLASSES.keys()} == BY_BASE
    known = redis.connection.DefaultParser.EXCEPTION_CLASSES.keys()
    assert known - {"ERR"} <= CODES.keys()


def test_a_class_and_its_code_agree() -> None:
    known = redis.connection.DefaultParser.EXCEPTION_CLASSES
    for code, kind in known.items():
        if isinstance(kind, type) and kind in CLASSES:
            assert CLASSES[kind] is CODES[code], code
