"""Run one function per calibration batch so that all of them reach a checkpoint before any goes past it.

Each task is a greenlet: a call stack that can be left in the middle of a model's forward and continued later. So a
layer sees the inputs of every batch, is quantized, and only then are the same forward passes continued: one forward
pass over the calibration data quantizes the whole model, and true_sequential costs no pass of its own.

Threads would do the same, but every thread that runs a parallel torch op gets an OpenMP pool of its own, and with more
pooled threads than cores OpenMP stops spinning and wakes its workers by system calls: small ops became 5x slower.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any


class Stop(BaseException):
    """Raised inside a task: it ends there. Not an Exception, so that no model code catches it."""


def wait(key: Hashable) -> None:
    """Called inside a task: pause until every task paused or ended and the driver has served ``key``."""
    import greenlet

    current = greenlet.getcurrent()
    assert current.parent is not None, "wait() outside of run()"
    current.parent.switch(key)


def run(
    functions: Sequence[Callable[[], object]],
    on_stage: Callable[[Any], None],
    order: Callable[[Any], int],
    agree: Callable[[Any], Any] = lambda key: key,
) -> None:
    """Run all functions to their end. An exception in one, or in ``on_stage``, ends all and is raised.

    Args:
        functions: the tasks; one runs at a time, always in this order.
        on_stage: called with the key at which tasks wait, before those go on.
        order: keys of lower order are served first when tasks wait at different ones (data-dependent control flow).
        agree: of several processes that run tasks in lockstep, given the key that this one would serve next, or None at
            the end of its tasks, returns that which all serve next, or None at the end of all.
    """
    import greenlet  # here: kernels and loading do without

    tasks = [greenlet.greenlet(partial(_until_stop, function)) for function in functions]
    try:
        waiting = {task: task.switch() for task in tasks}
        while True:
            waiting = {task: key for task, key in waiting.items() if not task.dead}
            if (served := agree(min(waiting.values(), key=order, default=None))) is None:
                break
            on_stage(served)
            for task in [task for task, key in waiting.items() if key == served]:
                waiting[task] = task.switch()
    finally:
        for task in tasks:
            if not task.dead:
                task.throw()  # GreenletExit: a BaseException, so that no handler in a model's forward swallows it


def _until_stop(function: Callable[[], object]) -> None:
    with suppress(Stop):
        function()
