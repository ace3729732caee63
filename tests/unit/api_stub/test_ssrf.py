"""Which addresses the gateway connects to for others, and that the address that was checked is the one that is used."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from typing import Any

import pytest

from api_stub.gateway.ssrf import SystemResolver, TargetPolicy, TargetRefused, is_public, parse_networks
from api_stub.gateway.webhooks.post import PostFailed, WebhookPost
from tests.gateway.receiver import receiving

PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
OTHERS = [
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.0.0.1", "192.0.2.1",
    "192.88.99.1", "192.168.1.1", "198.18.0.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::1", "100::1",
    "2001::1", "2001:db8::1", "2002:7f00:1::", "3fff::1", "3fff:fff::1", "fc00::1", "fd12::1", "fe80::1", "fec0::1",
    "ff02::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", OTHERS)
def test_every_other_address_is_not(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(TargetRefused):
        TargetPolicy().check_url(f"https://{host}/hook")


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost", "a.localhost."])
def test_this_machine_is_known_under_all_its_names(host: str) -> None:
    with pytest.raises(TargetRefused):
        TargetPolicy().check_url(f"https://{host}/hook")
    TargetPolicy(networks=parse_networks("127.0.0.0/8")).check_url(f"https://{host}/hook")


def send(policy: TargetPolicy, url: str, *answers: tuple[str, ...]) -> tuple[int, list[str]]:
    """Send once; the name resolves to these addresses, one answer after the other."""
    asked: list[str] = []

    async def ask(host: str, port: int) -> tuple[str, ...]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    async def use() -> int:
        return (await WebhookPost(policy, 5.0, ask).send(url, {}, b"{}")).status

    return asyncio.run(use()), asked


def test_a_name_that_leads_inside_is_refused_although_it_looked_well_before() -> None:
    policy = TargetPolicy(allow_http=True)
    with receiving() as receiver:
        for answers in (("127.0.0.1",), ("93.184.216.34", "127.0.0.1"), ("::ffff:127.0.0.1",)):
            policy.check_url(receiver.url("rebind.example"))
            with pytest.raises(TargetRefused, match="not a public one"):
                send(policy, receiver.url("rebind.example"), answers)
        assert receiver.requests == []


def test_a_name_is_asked_for_once_and_the_answer_is_used() -> None:
    policy = TargetPolicy(allow_http=True, networks=parse_networks("127.0.0.1"))
    with receiving() as receiver:
        status, asked = send(policy, receiver.url("hook.example"), ("127.0.0.1",), ("10.0.0.1",))
        assert (status, asked) == (204, ["hook.example"])
        assert receiver.requests[0].headers["host"] == f"hook.example:{receiver.port}"


def test_the_next_address_is_tried_when_the_first_does_not_answer() -> None:
    policy = TargetPolicy(allow_http=True, networks=parse_networks("127.0.0.0/8"))
    with receiving() as receiver:
        assert send(policy, receiver.url("hook.example"), ("127.0.0.2", "127.0.0.1"))[0] == 204


def test_names_that_take_long_to_look_up_delay_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up, is_over = socket.getaddrinfo, threading.Event()

    def slow_look_up(host: str, *details: Any, **options: Any) -> Any:
        is_over.wait(60)
        return look_up("127.0.0.1", *details, **options)

    async def use() -> None:
        resolver = SystemResolver()
        asking = [asyncio.create_task(resolver(f"{n}.slow.example", 80)) for n in range(40)]
        try:
            await asyncio.sleep(0)
            await asyncio.wait_for(asyncio.to_thread(is_over.is_set), 20)
        finally:
            is_over.set()
        assert set(await asyncio.gather(*asking)) == {("127.0.0.1",)}

    monkeypatch.setattr(socket, "getaddrinfo", slow_look_up)
    asyncio.run(use())


async def at_this_machine(host: str, port: int) -> tuple[str, ...]:
    """Resolve every name without delay."""
    return ("127.0.0.1",)


def test_posts_that_were_cancelled_leave_room_for_the_next() -> None:
    async def use(post: WebhookPost, silent: str, good: str) -> int:
        for num_turns in range(300):
            task = asyncio.create_task(post.send(silent, {}, b"{}"))
            for _ in range(num_turns % 15):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        return (await post.send(good, {}, b"{}")).status

    post = WebhookPost(TargetPolicy(allow_http=True, networks=parse_networks("127.0.0.1")), 20.0, at_this_machine)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as silent, receiving() as receiver:
        assert asyncio.run(use(post, f"http://hook.example:{silent.getsockname()[1]}/", receiver.url())) == 204


def test_a_name_without_an_address_is_a_failure_like_any_other() -> None:
    with pytest.raises(PostFailed, match="ConnectError"):
        send(TargetPolicy(), "https://nowhere.example/", ())
