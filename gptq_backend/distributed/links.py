"""The links between machines: which interface they go by, and how one that is cut is noticed."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from typing import Any

# A machine that loses power or its cable says nothing. After this many seconds without an answer the kernel ends the
# connection. The kernel answers, so a busy process is not taken for a lost one.
_SILENCE = 60
_PROBES = 4
_CHOICE = "GLOO_SOCKET_IFNAME"
_ADDRESS = "gptq_backend/address"  # in the store, with the rank


def choose_interface(store: Any, rank: int, size: int) -> None:
    """Let gloo use the interface by which this machine reaches the others, unless the user chose one.

    gloo takes that of this machine's name, which many systems give to loopback. All ranks call this.

    Args:
        store: that all ranks share.
    """
    if int(os.environ["GROUP_WORLD_SIZE"]) == 1:  # of torchrun: how many machines
        return
    own = _address_towards(os.environ["MASTER_ADDR"])
    store.set(f"{_ADDRESS}/{rank}", own)
    if not _is_far(own):  # the master has its own name, and its own name for loopback
        others = (store.get(f"{_ADDRESS}/{other}").decode() for other in range(size) if other != rank)
        own = next((_address_towards(other) for other in others if _is_far(other)), own)
    name = _interface_of(own) if _is_far(own) else None
    if name is not None:
        os.environ.setdefault(_CHOICE, name)


@contextmanager
def watched() -> Iterator[None]:
    """Connections that are made inside end if the machine at their other end is silent for a minute (Linux)."""
    if not sys.platform.startswith("linux"):
        yield
        return
    before = set(_sockets())
    yield
    for name, number in _sockets().items():
        if name in before:
            continue
        # Other threads may have closed it; and a run works without being watched.
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as copy:
            if copy.type == socket.SOCK_STREAM and copy.family in (socket.AF_INET, socket.AF_INET6):
                _watch(copy)


def _sockets() -> dict[str, int]:
    """The file descriptors of this process's sockets, by the kernel's name of each socket."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the list itself
            found[os.readlink(f"/proc/self/fd/{number}")] = int(number)
    return {name: number for name, number in found.items() if name.startswith("socket:")}


def _watch(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    pause = _SILENCE // (_PROBES + 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE * 1000)  # of data that was sent


def _is_far(address: str) -> bool:
    """Whether other machines can reach it."""
    return address != "" and not ip_address(address).is_loopback


def _address_towards(host: str) -> str:
    """The address of this machine from which packets to ``host`` leave; "" if there is no way."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # sends nothing
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return ""


def _interface_of(address: str) -> str | None:
    """The name of the interface that has an IPv4 address (Linux), or None."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), get_address, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
