"""Media at http(s) addresses of listed hosts: fetched, bounded, stored like inline media; all others are refused."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import openai
import pytest
import trustme

from api_stub.contract.media import S3Object
from api_stub.errors import InvalidSettings
from api_stub.gateway.app import create_app
from api_stub.gateway.keys import KeyRing
from api_stub.gateway.remote_media import Allowance, FetchRefused, RemoteFetcher, RemoteRules
from api_stub.gateway.ssrf import Resolve
from api_stub.settings import GatewaySettings
from tests.gateway.conftest import CREDENTIALS
from tests.gateway.media_server import CRUMBS, LIMIT_BYTES, MP4, PIECE, PNG, MediaServer, media_server
from tests.gateway.openai_stack import eager_worker, openai_client
from tests.gateway.service import Service, serving
from tests.gateway.test_submitting import job_of
from tests.servers import RedisServer, S3Server, eventually, free_port

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

LOOPBACK = "127.0.0.0/8, ::1/128"
FIELD = "messages.0.content.0.image_url.url"


@pytest.fixture(scope="module")
def pictures() -> Iterator[MediaServer]:
    with media_server() as server:
        yield server


@pytest.fixture
def host(pictures: MediaServer) -> MediaServer:
    """A foreign server that nobody has asked yet."""
    pictures.asked.clear()
    return pictures


def listed(server: MediaServer, **options: object) -> dict[str, Any]:
    """Settings of a gateway that may fetch from a server, whose address is not public."""
    hosts = f"http://127.0.0.1:{server.port}, http://localhost:{server.port}, http://127.0.0.1:1, *.cdn.example"
    usual = {"api_media_hosts": hosts, "api_media_networks": LOOPBACK, "api_models": "default"}
    return usual | {"api_max_body_bytes": LIMIT_BYTES} | options


@pytest.fixture(scope="module")
def fetching(redis_server: RedisServer, s3_server: S3Server, pictures: MediaServer) -> Iterator[Service]:
    s3_server.client()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        with serving(redis_server.url, s3_server.url, **listed(pictures)) as running:
            yield running


@pytest.fixture
def service(fetching: Service, redis_url: str) -> Service:
    """A gateway that may fetch from `host`."""
    return fetching


@pytest.fixture(scope="module")
def asking(fetching: Service) -> Iterator[openai.OpenAI]:
    with openai_client(fetching.url) as opened:
        yield opened


@pytest.fixture
def client(service: Service, asking: openai.OpenAI) -> openai.OpenAI:
    return asking


def turn(*urls: str, kind: str = "image") -> Any:
    parts = [{"type": f"{kind}_url", f"{kind}_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


def refused(client: openai.OpenAI, messages: Any, status: int = 400) -> Any:
    """Ask and return the error that a gateway answers with."""
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="default", messages=messages)
    assert caught.value.status_code == status, caught.value.message
    return caught.value


def test_pictures_and_clips_are_fetched_stored_and_keep_their_places(
    service: Service, client: openai.OpenAI, host: MediaServer, s3_client: S3Client, redis_url: str
) -> None:
    content: Any = [
        {"type": "image_url", "image_url": {"url": host.url("/scene.png")}},
        {"type": "text", "text": "and"},
        {"type": "video_url", "video_url": {"url": host.url("/clip.mp4", "LocalHost."), "num_frames": 4}},
        {"type": "image_url", "image_url": {"url": host.url("/scene.png?size=1#top")}},
        {"type": "image_url", "image_url": {"url": host.url("/scene.png")}},
        {"type": "image_url", "image_url": {"url": "s3://media/there.png"}},
        {"type": "image_url", "image_url": {"url": host.url("/untold")}},
        {"type": "image_url", "image_url": {"url": host.url("/stream")}},
        {"type": "text", "text": "What?"},
    ]
    with eager_worker(redis_url):
        answer = client.chat.completions.create(model="default", messages=[{"role": "user", "content": content}])
    assert answer.choices[0].message.content == "you said What?"
    (message,) = job_of(service, answer.id.removeprefix("chatcmpl-"))["messages"]  # type: ignore[misc]
    scene, _, clip, small, same, stored, untold, stream, _ = message["content"]
    assert (scene, stored["uri"], clip["num_frames"]) == (same, "s3://media/there.png", 4)
    for part, body, content_type in (
        (scene, PNG, "image/png"),
        (clip, MP4, "video/mp4"),
        (small, PNG + b"1", "image/png"),
        (untold, PNG, "application/octet-stream"),
        (stream, PNG, "application/octet-stream"),
    ):
        target = S3Object.parse(part["uri"])
        found = s3_client.get_object(Bucket=target.bucket, Key=target.key)
        assert (found["Body"].read(), found["ContentType"]) == (body, content_type)
    asked = dict(host.asked)
    assert len(asked) == len(host.asked) == 5  # the same address once
    assert asked["/clip.mp4"]["host"] == f"localhost:{host.port}"
    assert {headers["accept-encoding"] for headers in asked.values()} == {"identity"}


@pytest.mark.parametrize(
    ("path", "status", "code", "reason"),
    [
        ("/missing", 400, "invalid_image_url", "status 404"),
        ("/broken", 400, "invalid_image_url", "status 500"),
        ("/partial", 400, "invalid_image_url", "status 206"),
        ("/moved", 400, "invalid_image_url", "status 302, and redirects are not followed"),
        ("/login", 400, "media_unsupported", "'text/html', image/… is required"),
        ("/clip.mp4", 400, "media_unsupported", "'video/mp4', image/… is required"),
        ("/zipped", 400, "media_unsupported", "Content-Encoding 'gzip'"),
        ("/empty", 400, "invalid_image_url", "sent nothing"),
        ("/short", 400, "invalid_image_url", "no whole HTTP answer"),
        ("/not-http", 400, "invalid_image_url", "no whole HTTP answer"),
        ("/announced", 413, "media_too_large", f"more than {LIMIT_BYTES} bytes"),
        ("/endless", 413, "media_too_large", f"more than {LIMIT_BYTES} bytes"),
    ],
)
def test_what_is_no_picture_of_bounded_size_is_refused_by_name(
    client: openai.OpenAI, host: MediaServer, path: str, status: int, code: str, reason: str
) -> None:
    error = refused(client, turn(host.url(path)), status)
    assert (error.code, error.param) == (code, FIELD)
    assert f"http://127.0.0.1:{host.port}: " in error.message
    assert path not in error.message
    assert reason in error.message
    assert [asked for asked, _ in host.asked] == [path]
    eventually(lambda: host.num_open == 0, 30, "the connection is closed")


def test_the_limit_holds_for_all_media_of_a_request_together(client: openai.OpenAI, host: MediaServer) -> None:
    error = refused(client, turn(host.url("/half"), host.url("/half", "localhost")), 413)
    assert (error.code, error.type) == ("media_too_large", "invalid_request_error")


def test_a_clip_s_errors_name_its_field(client: openai.OpenAI, host: MediaServer) -> None:
    messages = [{"role": "system", "content": "Be short."}, *turn(host.url("/missing"), kind="video")]
    error = refused(client, messages)
    assert (error.code, error.param) == ("invalid_video_url", "messages.1.content.0.video_url.url")


def test_an_address_where_nobody_listens_is_told(client: openai.OpenAI) -> None:
    error = refused(client, turn("http://127.0.0.1:1/x"))
    assert (error.code, error.param) == ("invalid_image_url", FIELD)
    assert "http://127.0.0.1:1: it cannot be reached" in error.message


def test_a_host_that_takes_too_long_is_left(host: MediaServer, redis_url: str) -> None:
    with serving(redis_url, **listed(host, api_media_s=0.7)) as hasty, openai_client(hasty.url) as client:
        for path in ("/silent", "/dripping"):
            error = refused(client, turn(host.url(path)))
            assert error.code == "invalid_image_url"
            assert "did not send all within 0.7 s" in error.message
        eventually(lambda: host.num_open == 0, 30, "the connections are closed")


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("https://elsewhere.example/a.png", "media_forbidden"),
        ("http://127.0.0.1/a.png", "media_forbidden"),
        ("http://127.0.0.1:{other}/a.png", "media_forbidden"),
        ("https://127.0.0.1:{port}/a.png", "media_forbidden"),
        ("http://[::1]:{port}/a.png", "media_forbidden"),
        ("http://2130706433:{port}/a.png", "media_forbidden"),
        ("http://127.0.0.1.evil.example:{port}/a.png", "media_forbidden"),
        ("https://evilcdn.example/a.png", "media_forbidden"),
        ("https://a.cdn.example.evil.example/a.png", "media_forbidden"),
        ("http://user:hunter2@127.0.0.1:{port}/a.png", "invalid_request"),
        ("http://evil.example\\@127.0.0.1:{port}/a.png", "invalid_request"),
        ("ftp://127.0.0.1:{port}/a.png", "invalid_request"),
    ],
)
def test_what_is_not_listed_is_refused_and_not_asked(
    client: openai.OpenAI, host: MediaServer, address: str, code: str
) -> None:
    error = refused(client, turn(address.format(port=host.port, other=free_port())))
    assert (error.code, error.param, error.type) == (code, FIELD, "invalid_request_error")
    assert "hunter2" not in error.message
    assert "a.png" not in error.message
    assert host.asked == []


def test_a_listed_name_of_a_private_address_is_refused_unless_its_network_is_listed(
    host: MediaServer, redis_url: str
) -> None:
    with (
        serving(redis_url, **listed(host, api_media_networks="")) as guarded,
        openai_client(guarded.url) as client,
    ):
        for name, reason in (("127.0.0.1", "not a public one"), ("localhost", "this machine")):
            error = refused(client, turn(host.url("/scene.png", name)))
            assert error.code == "media_forbidden"
            assert reason in error.message
    assert host.asked == []


def fetch(url: str, ask: Resolve, **settings: str) -> None:
    """Fetch once, with names resolved by `ask`."""

    async def use() -> None:
        fetcher = RemoteFetcher(RemoteRules.load(GatewaySettings.model_validate(settings)), ask)
        with tempfile.TemporaryFile() as sink:
            await fetch_into(fetcher, url, cast("BinaryIO", sink))

    asyncio.run(use())


async def fetch_into(fetcher: RemoteFetcher, url: str, sink: BinaryIO) -> str:
    return await fetcher.fetch(fetcher.rules.hosts.address(url), "image", sink, Allowance(fetcher.rules))


class Resolver:
    """Answers with these addresses, one answer after the other; an empty one: there is no such name."""

    def __init__(self, *answers: tuple[str, ...]) -> None:
        self.asked: list[str] = []
        self._answers = answers

    async def __call__(self, name: str, port: int) -> tuple[str, ...]:
        self.asked.append(name)
        answer = self._answers[min(len(self.asked), len(self._answers)) - 1]
        if not answer:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return answer


def test_a_name_is_resolved_once_and_every_address_of_it_is_judged(host: MediaServer) -> None:
    url, hosts = host.url("/scene.png", "A.cdn.example."), f"http://*.cdn.example:{host.port}"
    for answer in (("127.0.0.1",), ("93.184.216.34", "127.0.0.1"), ("::ffff:127.0.0.1",), ("169.254.169.254",)):
        with pytest.raises(FetchRefused, match="not a public one") as caught:
            fetch(url, Resolver(answer), api_media_hosts=hosts)
        assert caught.value.code == "media_forbidden"
    assert host.asked == []
    rebinding = Resolver(("127.0.0.1",), ("10.0.0.1",))
    fetch(url, rebinding, api_media_hosts=hosts, api_media_networks="127.0.0.1")
    assert rebinding.asked == ["a.cdn.example"]
    assert host.asked[0][1]["host"] == f"a.cdn.example:{host.port}"


def test_fetches_that_were_cancelled_leave_room_for_the_next(host: MediaServer) -> None:
    async def use(fetcher: RemoteFetcher, silent: str, good: str) -> bytes:
        for num_turns in range(750):
            task = asyncio.create_task(fetch_into(fetcher, silent, io.BytesIO()))
            for _ in range(num_turns % 15):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        sink = io.BytesIO()
        await fetch_into(fetcher, good, sink)
        return sink.getvalue()

    with socket.create_server(("127.0.0.1", 0), backlog=1024) as silent:
        port, good = silent.getsockname()[1], host.url("/scene.png", "a.cdn.example")
        hosts = f"http://a.cdn.example:{port}, http://a.cdn.example:{host.port}"
        settings = {"api_media_hosts": hosts, "api_media_networks": "127.0.0.1", "api_media_s": 20}
        fetcher = RemoteFetcher(RemoteRules.load(GatewaySettings.model_validate(settings)), Resolver(("127.0.0.1",)))
        assert asyncio.run(use(fetcher, f"http://a.cdn.example:{port}/", good)) == PNG


class CountedFile(io.BytesIO):
    """Counts how often it is written to."""

    num_writes = 0

    def write(self, piece: Any) -> int:
        self.num_writes += 1
        return super().write(piece)


def test_a_host_that_sends_single_bytes_costs_no_write_for_each(host: MediaServer) -> None:
    url, sink = host.url("/crumbling"), CountedFile()
    settings = {"api_media_hosts": f"http://127.0.0.1:{host.port}", "api_media_networks": "127.0.0.1"}
    fetcher = RemoteFetcher(RemoteRules.load(GatewaySettings.model_validate(settings)))
    asyncio.run(fetch_into(fetcher, url, sink))
    assert sink.getvalue() == CRUMBS + PIECE
    assert sink.num_writes <= 3


def test_a_name_that_does_not_exist_is_told() -> None:
    with pytest.raises(FetchRefused, match="its name cannot be resolved") as caught:
        fetch("https://nowhere.example/", Resolver(()), api_media_hosts="nowhere.example")
    assert caught.value.code == "invalid_image_url"


def test_tls_asks_for_the_name_s_certificate(
    redis_url: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    ours, theirs = (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(2))
    authority.issue_cert("localhost").configure_cert(ours)
    authority.issue_cert("elsewhere.example").configure_cert(theirs)
    with media_server(ours) as right, media_server(theirs) as wrong:
        hosts = f"localhost:{right.port}, localhost:{wrong.port}"
        with (
            serving(redis_url, s3_server.url, **listed(right, api_media_hosts=hosts)) as running,
            eager_worker(redis_url),
            openai_client(running.url) as client,
        ):
            url = right.url("/scene.png", "localhost", "https")
            assert client.chat.completions.create(model="default", messages=turn(url)).choices
            error = refused(client, turn(wrong.url("/scene.png", "localhost", "https")))
        assert (error.code, wrong.asked) == ("invalid_image_url", [])


def test_a_client_that_leaves_ends_the_fetch(service: Service, host: MediaServer) -> None:
    body = json.dumps({"model": "default", "messages": turn(host.url("/silent"), host.url("/scene.png"))}).encode()
    with socket.create_connection(service.address, timeout=30) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        eventually(lambda: host.num_open == 1 and len(host.asked) == 2, 30, "one is fetched, the other is waited for")
    eventually(lambda: host.num_open == 0, 8, "the fetch ends before its own time limits")
    assert service.http.get("/v1/jobs").json()["jobs"] == []


def test_nothing_is_fetched_for_a_job_that_is_refused_anyway(client: openai.OpenAI, host: MediaServer) -> None:
    late = [*turn(host.url("/scene.png")), {"role": "system", "content": "late"}]
    assert refused(client, late).param == "messages.1"
    many = turn(*(host.url(f"/scene.png?{n}") for n in range(65)))
    assert refused(client, many).code == "invalid_request"
    assert refused(client, turn(host.url("/scene.png"), "https://elsewhere.example/")).code == "media_forbidden"
    assert host.asked == []


def test_jobs_and_batches_take_no_http_address(
    service: Service, client: openai.OpenAI, host: MediaServer, s3_client: S3Client
) -> None:
    job = {"task": "visionq.vqa", "question": "What?", "media": [host.url("/scene.png")]}
    answer = service.http.post("/v1/jobs", json=job)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "media.0")
    body = {"model": "default", "messages": turn(host.url("/scene.png"))}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = client.files.create(file=("input.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    eventually(lambda: client.batches.retrieve(batch.id).status == "completed", 60, "the batch ends")
    errors = client.batches.retrieve(batch.id).error_file_id
    assert errors is not None
    row = json.loads(client.files.content(errors).text)["response"]
    assert (row["status_code"], row["body"]["error"]["param"]) == (400, FIELD)
    assert "http(s) addresses are not fetched" in row["body"]["error"]["message"]
    assert host.asked == []


@pytest.mark.parametrize(
    ("setting", "value"), [("api_media_hosts", "*"), ("api_media_hosts", "a.example/x"), ("api_media_networks", "here")]
)
def test_a_wrong_setting_names_its_variable(setting: str, value: str) -> None:
    settings = GatewaySettings.model_validate({setting: value})
    with pytest.raises(InvalidSettings, match=f"VISIONQ_{setting.upper()}"):
        create_app(settings, KeyRing.load(settings))
