"""Two hosts on this machine: network namespaces that a pair of virtual network cards (veth) joins. Linux, for root."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What each command runs in: the host's own name, and a file of names in place of /etc/hosts.
INSIDE = 'echo "$1" >/proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


class NoHosts(RuntimeError):
    """Hosts cannot be made here; the message says why."""


class TwoHosts:
    """Hosts 0 and 1, whose `addresses` each reaches over the link. Use `two_hosts()`."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self, folder: Path) -> None:
        self._names = [f"um{os.getpid()}-{host}" for host in range(2)]
        self._files = [folder / f"hosts{host}" for host in range(2)]
        for name, file in zip(self._names, self._files, strict=True):
            # As Debian's installer writes it: by its own name a host finds nothing but loopback.
            file.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n", encoding="ascii")

    def command(self, host: int, *words: str | Path) -> list[str]:
        """The command line that runs a command on a host; its process is the command's own."""
        inside = ["unshare", "--uts", "--mount", "sh", "-c", INSIDE, "sh", self._names[host], str(self._files[host])]
        return ["ip", "netns", "exec", self._names[host], *inside, *map(str, words)]

    def cut(self) -> None:
        """Pull the cable."""
        _ip("-n", self._names[1], "link", "set", "link0", "down")

    def join(self) -> None:
        """Put it in again."""
        _ip("-n", self._names[1], "link", "set", "link0", "up")

    def kill(self, host: int) -> None:
        """End all that runs on a host at once, as where its power is gone."""
        listed = subprocess.run(["ip", "netns", "pids", self._names[host]], check=True, capture_output=True, text=True)
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def _make(self) -> None:
        for name in self._names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        first, second = self._names
        _ip("-n", first, "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", second)
        for name, address in zip(self._names, self.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "link0")
            _ip("-n", name, "link", "set", "link0", "up")
        subprocess.run(self.command(0, "true"), check=True, capture_output=True)

    def _remove(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Make two hosts, and remove them at the end. Raises NoHosts where that cannot be done."""
    if missing := [name for name in ("ip", "unshare") if shutil.which(name) is None]:
        raise NoHosts(f"two hosts need the program {missing[0]} (Debian: apt-get install iproute2 util-linux)")
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        hosts = TwoHosts(Path(folder))
        try:
            hosts._make()
            yield hosts
        except subprocess.CalledProcessError as error:
            reason = (error.stderr or b"").decode(errors="replace").strip().splitlines()
            raise NoHosts(f"two hosts need root and network namespaces: {reason[-1] if reason else error}") from None
        finally:
            hosts._remove()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
