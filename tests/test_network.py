"""util/distributed/network.py: ports, addresses and interfaces of this machine."""

from __future__ import annotations

import socket

import pytest

from util.distributed import network


def test_a_port_that_somebody_listens_on_is_taken_and_a_released_one_free():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert network.port_fault(port) == "taken"
    assert network.port_fault(port) is None


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("127.0.1.1", True), ("::1", True), ("10.0.0.1", False), ("fe80::1%eth0", False)],
)
def test_loopback_addresses_are_known(address, expected):
    assert network.is_loopback(address) is expected


def test_this_machine_reaches_itself_through_loopback():
    assert network.source_address("127.0.0.1") == "127.0.0.1"
    assert network.interface_of("127.0.0.1") in dict(network.interfaces())


def test_a_name_that_does_not_exist_has_no_way(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert network.source_address("no-such-host") is None


@pytest.mark.parametrize(
    ("master", "others", "expected"),
    [
        ("other", [], "eth1"),
        ("this", ["other"], "eth1"),  # on the master's own machine: the way to the others
        ("this", ["this", "far", "other"], "eth0"),  # the first that is not this machine
        ("this", ["this"], None),
        ("nowhere", [], None),
    ],
)
def test_the_interface_is_the_one_towards_the_other_machines(monkeypatch, master, others, expected):
    sources = {"this": "127.0.1.1", "other": "10.0.0.1", "far": "192.168.0.1"}
    monkeypatch.setattr(network, "source_address", sources.get)
    monkeypatch.setattr(
        network, "interfaces", lambda: [("lo", "127.0.0.1"), ("eth0", "192.168.0.1"), ("eth1", "10.0.0.1")]
    )
    assert network.choose_interface(master, others) == expected
