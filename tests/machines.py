"""Machines for the tests that are made of Linux namespaces on this one, joined by a virtual cable.

Each has a network, a name, process numbers, shared memory and mounts of its own; files are shared, as on a cluster with
a network file system, but for what :meth:`Machine.hide` replaces. A machine is gone when its first process is, which
ends with the pipe to the test: nothing stays, even if the test is killed.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ADDRESSES = {"first": "10.213.7.1", "second": "10.213.7.2"}
_TOOLS = ("unshare", "nsenter", "ip")
_UNSHARE = ["unshare", "--net", "--mount", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]
# Before /proc is mounted anew it tells this shell's number outside.
_FIRST = """read number rest < /proc/self/stat
mount --make-rprivate / && mount -t proc proc /proc && mount -t tmpfs tmpfs /dev/shm || exit
printf '127.0.0.1 localhost\n%s' "$2" > /dev/shm/hosts && mount --bind /dev/shm/hosts /etc/hosts || exit
hostname "$1" && ip link set lo up && echo "$number" && exec cat"""


class Machine:
    """One of two machines.

    Args:
        hosts: addresses of names.

    Attributes:
        interface: the name of the only one but loopback.
    """

    def __init__(self, name: str, hosts: Mapping[str, str]) -> None:
        self.name, self.interface = name, "cable"
        known = "".join(f"{address} {name}\n" for name, address in hosts.items())
        self._first = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", _FIRST, "sh", name, known],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._first.stdout is not None
        assert self._first.stderr is not None
        self.number = self._first.stdout.readline().strip()
        if not self.number:
            told = self._first.stderr.read()
            self.close()
            raise OSError(f"no namespaces for {name}: {told}")

    def inside(self, command: Sequence[object]) -> list[str]:
        """The command that runs ``command`` on this machine."""
        spaces = ["--net", "--mount", "--ipc", "--uts", "--pid"]
        return ["nsenter", "--target", self.number, *spaces, "--wdns=/", *map(str, command)]

    def run(self, *command: object) -> str:
        """What ``command`` prints."""
        return _output(self.inside(command))

    def popen(self, command: Sequence[object], environment: Mapping[str, str], **options: Any) -> subprocess.Popen[Any]:
        """Start ``command``, alone in a session."""
        return subprocess.Popen(self.inside(command), env=dict(environment), start_new_session=True, **options)

    def hide(self, folder: Path) -> None:
        """Give this machine an empty folder of its own in place of ``folder``, which exists."""
        self.run("mount", "-t", "tmpfs", "tmpfs", folder)

    def unplug(self) -> None:
        """Pull the cable: nothing arrives any more, and nobody is told."""
        self.run("ip", "link", "set", self.interface, "down")

    def close(self) -> None:
        """Switch it off, with everything that runs on it."""
        self._first.kill()
        self._first.communicate()


@functools.cache
def obstacle() -> str | None:
    """Why there can be no machines here, or None."""
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)}"
    try:
        with two_machines():
            pass
    except OSError as error:
        return f"needs the right to make network namespaces, as root has it outside of most containers ({error})"
    return None


@contextmanager
def two_machines(own_address: str | None = None) -> Iterator[tuple[Machine, Machine]]:
    """Two machines, ``first`` and ``second``, that reach each other by name or address, and nothing else.

    Args:
        own_address: what a machine takes its own name for, as ``127.0.1.1`` on Debian; by default the true address.

    Raises:
        OSError: this system or this user cannot make them.
    """
    with ExitStack() as stack:
        machines = []
        for name in ADDRESSES:
            machines.append(Machine(name, ADDRESSES | ({} if own_address is None else {name: own_address})))
            stack.callback(machines[-1].close)
        ends = [["name", machine.interface, "netns", machine.number] for machine in machines]
        _output(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]])
        for machine in machines:
            machine.run("ip", "address", "add", f"{ADDRESSES[machine.name]}/24", "dev", machine.interface)
            machine.run("ip", "link", "set", machine.interface, "up")
        yield machines[0], machines[1]


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
