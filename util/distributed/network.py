"""Ports, addresses and network interfaces of this machine. Imports nothing heavy: the launcher checks ports with it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Sequence

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def port_fault(port: int) -> str | None:
    """Why a server could not listen on `port` of this machine now; None if it could."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        # The rendezvous server sets this too: a port that an earlier run has just released counts as free.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            return "taken" if error.errno == errno.EADDRINUSE else f"not usable ({error.strerror})"
    return None


def source_address(host: str) -> str | None:
    """The address of this machine from which it reaches `host` (name or address); None if there is no way.

    Connecting a UDP socket sends nothing: it only asks the routing table.
    """
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, target in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return probe.getsockname()[0]
    return None


def is_loopback(address: str) -> bool:
    """Whether `address` is one that only this machine itself can reach, such as Debian's 127.0.1.1."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """The name of the interface that has `address`, such as eth0. None if it cannot be found."""
    return next((name for name, own in interfaces() if own == address.partition("%")[0]), None)


def interfaces() -> list[tuple[str, str]]:
    """(name, address) of this machine's interfaces: the first IPv4 address of each, and its IPv6 addresses. Linux."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append((name, socket.inet_ntoa(answer[20:24])))
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as table:
        for line in table:
            digits, *_, name = line.split()
            found.append((name, str(ipaddress.IPv6Address(int(digits, 16)))))
    return found


def choose_interface(master: str, others: Sequence[str]) -> str | None:
    """The interface through which this machine reaches the other ones; None if it cannot be found.

    It is the one towards `master`. On the master's own machine that may be loopback: there it is the one towards the
    first of the `others`, the addresses by which the processes of the run reach the master.
    """
    for target in (master, *others):
        address = source_address(target)
        if address is not None and not is_loopback(address):
            return interface_of(address)
    return None
