"""Addresses as people write them."""

import pytest

from lightllm.addresses import is_address, is_loopback, join_address, normalize_host, split_addresses


@pytest.mark.parametrize(
    ("host", "normal"),
    [
        ("127.0.01", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("010.0.0.1", "8.0.0.1"),
        ("127.0.0.1", "127.0.0.1"),
        ("300.1.1.1", "300.1.1.1"),
        ("1.2.3.4.5", "1.2.3.4.5"),
        ("localhost", "localhost"),
        ("::1", "::1"),
        ("", ""),
    ],
)
def test_normalize_host(host, normal):
    assert normalize_host(host) == normal


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "::1", "localhost", "a-b.example.org.", "master_addr", "node1"]
)
def test_addresses(host):
    assert is_address(host)


@pytest.mark.parametrize(
    "host", ["", ".", "300.1.1.1", "a b", "a/b", "-a", "::g", "a" * 64, "h:80", "<host>"]
)
def test_no_addresses(host):
    assert not is_address(host)


def test_loopback():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"))
    # A socket for both families shows IPv4 clients so; and what begins like loopback need not be it.
    assert is_loopback("::ffff:127.0.0.1")
    assert not any(is_loopback(host) for host in ("::ffff:10.0.0.1", "::1234"))


def test_lists_of_addresses():
    assert split_addresses("a:1") == [("a", 1)]
    assert split_addresses("127.1:2379,[::1]:2") == [("127.0.0.1", 2379), ("::1", 2)]
    assert [join_address(*address) for address in split_addresses("a:1,[::1]:2")] == ["a:1", "[::1]:2"]


@pytest.mark.parametrize("part", ["", "a", "a:", ":1", "a:0", "a:65536", "::1:2", "[a]:1", "a b:1", "a:1:2"])
def test_the_wrong_one_of_a_list_is_named(part):
    with pytest.raises(ValueError) as caught:
        split_addresses(f"a:1,{part}")
    assert repr(part) in str(caught.value)
