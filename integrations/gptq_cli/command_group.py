"""How a command ends: errors as one line, signals that unwind, exit codes."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from . import INTERRUPTED

# ClickException, which typer brings in one of two ways and does not export: what it prints itself.
_USAGE: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
_TWICE = 5.0  # seconds in which a signal that comes again is the same one


class CommandGroup(TyperGroup):
    """Errors that the user can fix are one line on stderr and exit code 1; any other is a bug and has its trace."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the options of the whole program."""
        with _interruptible():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _interruptible(), unwinding_signals():
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort, _USAGE):
                raise
            except Exception as error:
                from .terminal import explain, printable

                message = explain(error)
                if message is None:
                    raise
                print(f"error: {printable(message)}", file=sys.stderr)
                raise typer.Exit(1) from None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; nothing was left half-written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@contextlib.contextmanager
def unwinding_signals() -> Iterator[None]:
    """SIGTERM (``timeout``, job schedulers) and SIGHUP (a closed terminal) unwind like Ctrl-C, so that temporary
    folders vanish. What is ignored, as SIGHUP is under ``nohup``, stays ignored.
    """
    last = float("-inf")

    def stop(number: int, _: Any) -> None:
        nonlocal last
        repeated, last = time.monotonic() - last < _TWICE, time.monotonic()
        if not repeated:  # shells and the kernel both send SIGHUP; the second would break off the unwinding
            raise SystemExit(128 + number)

    before = {}
    try:
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread, which is where Python allows this
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
