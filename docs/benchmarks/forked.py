"""Running something in a forked process and sending it a signal, after a while or at one of its file operations."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gptq_cli

SIGNALS = {"kill -9": signal.SIGKILL, "Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}
UNNAMED = {"fcntl.flock", "ctypes.dlsym"}  # of files that are open; around the swap
# File operations that count.
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.listdir", "os.scandir", *UNNAMED}
TIMEOUT = 120.0  # seconds for one process


def forked(work: Callable[[], None], log: Path, kill: tuple[float, int] | None = None) -> int:
    """Call ``work`` in a child process whose output goes to ``log`` -> its exit code, or minus the signal."""
    log.write_bytes(b"")
    signal.pthread_sigmask(
        signal.SIG_BLOCK, set(SIGNALS.values()) - {signal.SIGKILL}
    )  # until the child is ready for them
    child = os.fork()
    if child == 0:
        _end_as_a_program(work, log)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if kill is not None:
        time.sleep(kill[0])
        os.kill(child, kill[1])
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise SystemExit(f"a run did not end within {TIMEOUT} s:\n{log.read_text()}")


def _end_as_a_program(work: Callable[[], None], log: Path) -> None:
    """Call ``work`` and end this process as the interpreter would, whatever comes; nothing above it is unwound."""
    code = 70
    try:
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            target = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(target, 1)
            os.dup2(target, 2)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except KeyboardInterrupt:
            code = gptq_cli.INTERRUPTED
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class Operations:
    """Counts this process's file operations in a folder, and sends it a signal just before one of them.

    Args:
        folder: others, of imports say, do not count.
        step, number: before which operation, counted from 1, which signal; 0 for none.
    """

    def __init__(self, folder: Path, step: int = 0, number: int = 0) -> None:
        self.folder, self.step, self.number, self.count = str(folder), step, number, 0

    def watch(self) -> None:
        """Begin, for the rest of the process's life."""
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not (event in UNNAMED or self.folder in f"{arguments[0]}"):
            return
        self.count += 1
        if self.count == self.step:
            os.kill(os.getpid(), self.number)
