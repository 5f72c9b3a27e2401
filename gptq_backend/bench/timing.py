"""Times of several candidates that do the same work, taken alternately, so that a slow second hits all of them."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

# Seconds of consecutive calls that make one sample: long beside the clock and the switch between candidates.
_BLOCK = 0.005


@dataclass
class Candidate:
    """One of the things to compare."""

    name: str  # for the row
    calls: Sequence[Callable[[], object]]  # the same on different copies of the weights, to be made in turn
    samples: list[float] = field(default_factory=list)  # seconds per call, one entry per block of calls
    timed_calls: int = 0  # behind ``samples``
    spent: float = 0.0  # seconds behind them
    reason: str | None = None  # why it has no times; None while all is well

    def __post_init__(self) -> None:
        self._turn = itertools.cycle(self.calls)
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """Make all calls one CUDA graph, whose replay is what gets timed: the device's work without launching it.

        Raises:
            RuntimeError: a call does something that cannot be captured.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in self.calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in self.calls:
                call()
        self._graph = graph

    def add_sample(self, device: torch.device) -> None:
        """Time one block of calls. Without a graph a GPU is waited for after each: launching is part of the time."""
        if self._graph is not None:
            self._replay(self._graph)
            return
        calls, elapsed = 0, 0.0
        synchronize(device)
        start = time.perf_counter()
        while elapsed < _BLOCK:
            next(self._turn)()
            synchronize(device)
            calls += 1
            elapsed = time.perf_counter() - start
        self._add(elapsed, calls)

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        elapsed, replays = 0.0, 1
        while elapsed < _BLOCK:
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end) / 1e3
            replays, calls = replays * 2, replays * len(self.calls)
        self._add(elapsed, calls)

    def _add(self, elapsed: float, calls: int) -> None:
        self.samples.append(elapsed / calls)
        self.timed_calls += calls
        self.spent += elapsed


def interleave(candidates: Sequence[Candidate], seconds: float, device: torch.device, launching: bool = False) -> None:
    """Add samples in rounds of one per candidate; each takes part until it has spent its ``seconds`` or raised.

    launching: on an NVIDIA GPU, what it costs to launch the work is to be timed too.
    """
    live = list(candidates)
    with torch.no_grad():
        if device.type == "cuda" and not launching:
            for candidate in live:
                try:
                    candidate.capture()
                except Exception as error:
                    candidate.reason = explain(error)
            live = [candidate for candidate in live if candidate.reason is None]
        while live:
            for candidate in live:
                try:
                    candidate.add_sample(device)
                except Exception as error:  # of foreign code, maybe hours into a run
                    candidate.reason = explain(error)
            live = [candidate for candidate in live if candidate.reason is None and candidate.spent < seconds]


def explain(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, median, third


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """``torch.set_num_threads(count)`` for a while; None leaves them alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
