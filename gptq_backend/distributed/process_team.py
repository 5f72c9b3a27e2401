"""A team of the processes that torchrun started, over gloo on CPUs and nccl on GPUs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import GPTQError, is_out_of_memory
from ..timing import timed
from .links import choose_interface, watched
from .team import Team, as_tensor, from_tensor

# That ranks may be apart: the others wait for what the first does alone, and a distillation can take days. A rank that
# dies is noticed at once, and a machine that is silent within a minute.
_TIMEOUT = timedelta(days=30)
_ALIGNMENT = 16  # bytes: every tensor begins where its dtype may
_FAILED = "gptq_backend/failed"  # in the store that all ranks share: how many have failed


class RankLostError(GPTQError):
    """Another rank has ended."""


class ProcessTeam(Team):
    """The ranks of torch.distributed's default group, which is of gloo.

    Args:
        device: where this rank computes; for a GPU the tensors travel by nccl.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device
        self._group = dist.new_group(backend="nccl", timeout=_TIMEOUT) if device.type == "cuda" else None

    @timed("exchange")
    def all_gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        own = self._pack(tensors)
        with _losses():
            lengths = [int(each) for (each,) in self._numbers([own.numel()])]
            padded = own.new_zeros(max(lengths))
            padded[: own.numel()] = own
            parts = [torch.empty_like(padded) for _ in lengths]
            dist.all_gather(parts, padded, group=self._group)
        return [_unpack(part[:length]) for part, length in zip(parts, lengths)]

    @timed("exchange")
    def exchange(self, pieces: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        packed = [self._pack(each) for each in pieces]
        sizes = [each.numel() for each in packed]
        with _losses():
            coming = [row[self.rank] for row in self._numbers(sizes)]
            received = torch.empty(sum(coming), dtype=torch.uint8, device=self._device)
            dist.all_to_all_single(received, torch.cat(packed), coming, sizes, group=self._group)
        return [_unpack(each) for each in received.split(coming)]

    @timed("exchange")
    def broadcast(self, source: int, tensors: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        own = self._pack(tensors()) if source == self.rank else None
        length = torch.tensor([0 if own is None else own.numel()])
        with _losses():
            dist.broadcast(length, source)
            buffer = torch.empty(int(length), dtype=torch.uint8, device=self._device) if own is None else own
            dist.broadcast(buffer, source, group=self._group)
        return _unpack(buffer)

    @timed("exchange")
    def least(self, value: int) -> int:
        number = torch.tensor(value)
        with _losses():
            dist.all_reduce(number, dist.ReduceOp.MIN)
        return int(number)

    def _numbers(self, own: Sequence[int]) -> list[list[int]]:
        """As many integers of every rank, by rank."""
        parts = [torch.empty(len(own), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(parts, torch.tensor(own, dtype=torch.int64))
        return [part.tolist() for part in parts]

    def _pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Bytes: the length of a description, that, and the tensors."""
        facts = [[str(each.dtype).removeprefix("torch."), list(each.shape), each.is_cpu] for each in tensors]
        header = as_tensor(facts)
        pieces = [torch.tensor([header.numel()]).view(torch.uint8), header]
        pieces += [each.detach().contiguous().flatten().view(torch.uint8) for each in tensors]
        sizes = [_aligned(piece.numel()) for piece in pieces]
        packed = torch.zeros(sum(sizes), dtype=torch.uint8, device=self._device)
        for place, piece in zip(packed.split(sizes), pieces):
            place[: piece.numel()] = piece
        return packed


def _unpack(packed: Tensor) -> list[Tensor]:
    """Undo :meth:`ProcessTeam._pack`."""
    length = int(packed[:8].view(torch.int64))
    facts: list[Any] = from_tensor(packed[_ALIGNMENT : _ALIGNMENT + length])
    start, found = _ALIGNMENT + _aligned(length), []
    for name, shape, on_cpu in facts:
        dtype: torch.dtype = getattr(torch, name)
        size = dtype.itemsize * torch.Size(shape).numel()
        tensor = packed[start : start + size].view(dtype).view(shape)
        found.append(tensor.cpu() if on_cpu else tensor)
        start += _aligned(size)
    return found


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@contextmanager
def _losses() -> Iterator[None]:
    """What torch raises where another rank does not answer."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise RankLostError(
            f"another rank has ended or cannot be reached ({str(error).partition(chr(10))[0]}), and this one cannot go "
            "on alone; torchrun's report says which one ended; begin the same run again, with any number of ranks: "
            "it goes on from the last finished block"
        ) from error


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    if not dist.is_available():  # a torch that was built without
        return False
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def joined(device: str) -> Iterator[tuple[Team, str]]:
    """The team that this process is of, and the device where it computes: one GPU for each rank of a machine.

    Of several ranks that fail only the first one's error goes on; the others end with SystemExit, without a word.

    Raises:
        GPTQError: this is one of several processes, but not of torchrun's; or they are a group already.
    """
    if not launched():
        if (size := os.environ.get("WORLD_SIZE", "1")) not in ("", "0", "1") and "RANK" in os.environ:
            raise GPTQError(
                f"WORLD_SIZE is {size}, so this is one of several processes, and each would write the same folder: "
                "start them by torchrun, which sets all that they need, or unset WORLD_SIZE to let one work alone"
            )
        yield Team(), device
        return
    if dist.is_initialized():
        raise GPTQError("torch.distributed has a default group already; pass team=ProcessTeam(device), which uses it")
    from torch.distributed.rendezvous import rendezvous  # not in every torch

    with watched():
        store, rank, size = next(rendezvous("env://"))
    try:
        _connect(store, rank, size)
        if device.partition(":")[0] == "cuda":
            device = _own_gpu(device)
        yield ProcessTeam(torch.device(device)), device
        with _losses():
            dist.barrier()  # who leaves early takes the connections along
    except Exception as error:
        if _is_first_failure(store):
            raise
        raise SystemExit(1) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _connect(store: Any, rank: int, size: int) -> None:
    """Make the default group.

    Raises:
        GPTQError: this rank cannot reach another one.
    """
    try:
        choose_interface(store, rank, size)
        with watched():
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    except RuntimeError as error:
        raise GPTQError(
            f"rank {rank} on {socket.gethostname()} cannot reach the others ({str(error).partition(chr(10))[0]}); "
            f"it used the interface {os.environ.get('GLOO_SOCKET_IFNAME', 'of its own name')!r}: set "
            "GLOO_SOCKET_IFNAME on each machine to the one that reaches the others, and let their ports through"
        ) from error


def _own_gpu(device: str) -> str:
    """The GPU of this rank.

    Raises:
        GPTQError: one for all was asked for, or there are more ranks than GPUs.
    """
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device != "cuda":
        raise GPTQError(f"device {device!r} is one GPU for all ranks; pass cuda: rank i of a machine takes GPU i")
    if local >= count:
        advice = f"start at most {count} ranks" if count else "leave the device out to compute on the CPU"
        raise GPTQError(f"rank {local} of this machine has no GPU, as there are {count}; {advice}")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _is_first_failure(store: Any) -> bool:
    try:
        return bool(store.add(_FAILED, 1) == 1)
    except RuntimeError:  # the machine that kept the store is gone: one rank of each other machine says so
        return os.environ["LOCAL_RANK"] == "0"


__all__ = ["ProcessTeam", "RankLostError", "joined", "launched"]
