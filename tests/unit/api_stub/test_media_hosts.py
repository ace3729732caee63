"""Which http(s) addresses the list of media hosts admits, and how it and they are read."""

from __future__ import annotations

import pytest

from api_stub.gateway.media_hosts import NO_HOSTS, AddressRefused, MediaAddress, MediaHosts

HOSTS = MediaHosts.parse(
    "images.example, *.cdn.example, files.example:8443, http://plain.example, http://plain.example:8080,"
    " https://Spelled.Example., [2001:db8::0:1], 192.0.2.7"
)


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://images.example/a.png", "https://images.example"),
        ("HTTPS://Images.EXAMPLE/a.png", "https://images.example"),
        ("https://images.example./a.png", "https://images.example"),
        ("https://images.example:443/a.png", "https://images.example"),
        ("https://images.example", "https://images.example"),
        ("https://a.cdn.example/x", "https://a.cdn.example"),
        ("https://b.a.cdn.example./x", "https://b.a.cdn.example"),
        ("https://files.example:8443/x", "https://files.example:8443"),
        ("http://plain.example/x", "http://plain.example"),
        ("http://plain.example:8080/x", "http://plain.example:8080"),
        ("https://spelled.example/x", "https://spelled.example"),
        ("https://[2001:DB8:0::1]/x", "https://[2001:db8::1]"),
        ("https://192.0.2.7/x", "https://192.0.2.7"),
    ],
)
def test_a_listed_host_is_admitted_however_it_is_spelled(url: str, origin: str) -> None:
    assert HOSTS.address(url).origin == origin


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example/",
        "https://evilimages.example/",
        "https://a.images.example/",
        "https://images.example.evil.net/",
        "https://cdn.example/",
        "https://evilcdn.example/",
        "https://a.cdn.example.evil.net/",
        "https://evil.net/a.cdn.example",
        "https://evil.net?.cdn.example",
        "https://evil.net#.cdn.example",
        "https://images.example:8443/",
        "https://files.example/",
        "http://images.example/",
        "http://images.example:443/",
        "http://files.example:8443/",
        "https://plain.example/",
        "https://plain.example:8080/",
        "https://[2001:db8::2]/",
        "https://[::1]/",
        "https://3221225991/",
        "https://0300.0.2.7/",
    ],
)
def test_another_host_is_not(url: str) -> None:
    with pytest.raises(AddressRefused, match="is not among the hosts") as refused:
        HOSTS.address(url)
    assert refused.value.code == "media_forbidden"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://user:hunter2@images.example/", "user name"),
        ("https://images.example:hunter2@evil.net/", "user name"),
        ("https://@images.example/", "user name"),
        ("https://evil.net\\@images.example/", "user name"),
        ("https://evil.net\\.cdn.example/", "host and port"),
        ("https://images.example:/x", "host and port"),
        ("https://images.example:0/x", "host and port"),
        ("https://images.example:65536/x", "host and port"),
        ("https://images.example:4%343/x", "host and port"),
        ("https://images%2eexample/x", "host and port"),
        ("https://images..example/x", "host and port"),
        ("https://.cdn.example/x", "host and port"),
        ("https://images.example../x", "host and port"),
        ("https://[fe80::1%25eth0]/x", "host and port"),
        ("https://[images.example]/x", "host and port"),
        ("https:///x", "host and port"),
        (f"https://{'a' * 64}.cdn.example/x", "host and port"),
        ("https:images.example/x", "not an http"),
        ("https:/images.example/x", "not an http"),
        ("https://images.example/\u00e4", "printable ASCII"),
        ("https://\u0131mages.example/", "printable ASCII"),
        ("https://images.example/a b", "printable ASCII"),
        ("https://images.example/a\r\nHost: evil.net", "printable ASCII"),
        ("https://images.example/\t", "printable ASCII"),
        ("https://images.example/" + "a" * 8192, "the limit is 8192"),
    ],
)
def test_an_address_that_two_might_read_differently_is_refused(url: str, reason: str) -> None:
    with pytest.raises(AddressRefused, match=reason) as refused:
        HOSTS.address(url)
    assert refused.value.code == "invalid_request"
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("rest", "target"), [("", "/"), ("/a/b?c=d&e#f", "/a/b?c=d&e"), ("?a=https://x/", "/?a=https://x/"), ("#f", "/")]
)
def test_path_and_query_are_kept_as_they_are(rest: str, target: str) -> None:
    assert HOSTS.address(f"https://images.example{rest}").target == target


def test_an_empty_list_says_what_to_send_instead() -> None:
    for hosts in (NO_HOSTS, MediaHosts.parse(" , ")):
        with pytest.raises(AddressRefused, match="not fetched; send a data URL") as refused:
            hosts.address("https://images.example/")
        assert refused.value.code == "invalid_request"


@pytest.mark.parametrize(
    "text",
    ["*", "*.", "a.example/", "https://a.example/x", "ftp://a.example", "a..example", "a.example:0", "a.example:x",
     "*.1", "*.0x7f", "user@a.example", "*.1.2.3.4", "*.[::1]", "*.*.example", "a.*.example", "ok.example, b c", "[::1",
     "\u00e4.example"],
)  # fmt: skip
def test_a_list_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="'"):
        MediaHosts.parse(text)


@pytest.mark.parametrize(
    "text", ["ftp://a.example", "ftp://a.example:1", "s3://a:1", "http://ftp://a:1", "https:://a:1"]
)
def test_a_list_with_another_scheme_says_which_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="only `http://` or `https://` may precede a host"):
        MediaHosts.parse(text)


def test_an_ipv6_address_has_brackets_wherever_it_is_told() -> None:
    address = MediaAddress.parse("http://[::1]:8080/x")
    assert (address.host, address.authority, address.origin) == ("::1", "[::1]:8080", "http://[::1]:8080")
