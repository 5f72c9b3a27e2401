"""What a run spends its time on, for those who ask; costs nothing otherwise."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


class Recorder:
    """Seconds by phase. Time inside a phase that another one was entered from counts for the inner one only.

    ``device`` is waited for wherever a phase begins or ends.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._phases = device, ["forward"]
        self._since = time.perf_counter()

    def switch(self) -> None:
        """Add the time since the last call to the phase that it was spent in."""
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._phases[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.switch()
        self._phases.append(name)
        try:
            yield
        finally:
            self.switch()
            self._phases.pop()


_current: Recorder | None = None


@contextmanager
def record(device: torch.device) -> Iterator[Recorder]:
    """Collect the phases of what runs inside; what is in none of them counts as "forward"."""
    global _current
    before, _current = _current, Recorder(device)
    try:
        yield _current
        _current.switch()
    finally:
        _current = before


def timed(name: str) -> Callable[[Function], Function]:
    """Make a function a phase."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _current is None:
                return function(*args, **kwargs)
            with _current.phase(name):
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
