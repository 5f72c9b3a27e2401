"""What the commands share: errors as one line, logging, what goes to the terminal, JSON, progress, text files."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from safetensors import SafetensorError

from gptq_backend import CalibrationError, GPTQError
from gptq_backend.errors import is_out_of_memory
from gptq_backend.locks import write_text
from gptq_transformers.errors import first_line

from .formatting import to_json


def explain(error: Exception) -> str | None:
    """One line for an error that the user can fix; None for any other."""
    if isinstance(error, OSError):
        if error.errno == errno.EPIPE:
            return None  # the reader of our output went away; the CLI library ends quietly
        if error.errno == errno.ENOSPC:
            return "no space left on the disk; free some, or write to another one"
        if error.filename is not None and error.strerror:
            return f"{error.filename}: {error.strerror}"
        return first_line(error)  # transformers raises OSError for models that it cannot find
    if is_out_of_memory(error):
        return f"out of memory; use a smaller batch or model, or another device ({first_line(error)})"
    if isinstance(error, GPTQError | SafetensorError | ImportError):
        return first_line(error)
    return None


def printable(text: str) -> str:
    r"""``text`` with what is not printable as an escape (``\x1b``), but line ends and tabs: names and values that come
    from files must not steer the terminal.
    """
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


class TerminalConsole(Console):
    """stderr, for progress and warnings, on which text is only ever text: no markup, no links, no control characters
    but rich's own.
    """

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Whatever is printed comes by here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def say(text: str) -> None:
    """A line of a result, to stdout."""
    print(printable(text), flush=True)


class _ConsoleHandler(logging.Handler):
    """A line per message, above a progress bar; not wrapped, so that commands and paths in it can be copied."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(f"{record.levelname.lower()}: {self.format(record)}", soft_wrap=True)


def set_up_logging(console: Console, ignore: str | None = None, quiet: bool = False) -> None:
    """Our warnings above the progress bar, but for those of the logger ``ignore``, and none where ``quiet``; of the
    libraries only errors.
    """
    import transformers

    handler = _ConsoleHandler(console)
    handler.setLevel(logging.ERROR if quiet else logging.NOTSET)
    handler.addFilter(lambda record: record.name != ignore)
    for name in ("gptq_backend", "gptq_transformers", "gptq_cli"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def start(
    json_target: str | None, ignore: str | None = None, quiet: bool = False
) -> tuple[Console, Callable[[str], None]]:
    """What every command does first: set up logging (without warnings where ``quiet``), and check where its result
    goes.

    Returns:
        The console for progress and warnings, and :func:`say`, which says nothing where stdout is for JSON.
    """
    console = TerminalConsole()
    set_up_logging(console, ignore, quiet)
    check_json_target(json_target)
    return console, (lambda _: None) if json_target == "-" else say


def check_json_target(target: str | None) -> None:
    """Raise GPTQError before an hour of work, not after it, if the result cannot be written."""
    if target is None or target == "-":
        return
    if Path(target).is_dir():
        raise GPTQError(f"--json {target} is a folder; expected a file: name one, or - for stdout")
    folder = Path(target).absolute().parent
    if not folder.is_dir():
        raise GPTQError(f"--json {target}: its folder does not exist; create it or choose another place")
    special = Path(target).exists() and not Path(target).is_file()  # a pipe is written itself, a file beside it
    if not os.access(target if special else folder, os.W_OK):
        raise GPTQError(f"--json {target} cannot be written here; choose another place")


def check_choice(option: str, value: str, allowed: Collection[str]) -> None:
    """Raise GPTQError unless the option's value is one of those ``allowed``."""
    if value not in allowed:
        raise GPTQError(f"{option} {value}: expected one of {', '.join(allowed)}")


def write_json_line(value: Mapping[str, Any]) -> None:
    """An object in one line, to stdout, at once."""
    print(to_json(value, indent=None), flush=True)


def write_json(target: str | None, value: Mapping[str, Any]) -> None:
    """To a file, to stdout for ``-``, or nowhere for None."""
    if target is None:
        return
    text = to_json(value) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(target), text)


def read_text(path: Path) -> str:
    """A UTF-8 text file, without the byte order mark that it may begin with.

    Raises:
        GPTQError: it does not exist or is not text.
    """
    if not path.exists():
        raise GPTQError(
            f"{path} is not a file; expected a text file in UTF-8 (names of data sets are not looked up: save some of "
            "its text to a file)"
        )
    if path.is_dir():
        raise GPTQError(f"{path} is a folder; expected a text file in UTF-8")
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise GPTQError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None


def json_lines(text: str) -> Iterator[tuple[int, str, Any]]:
    """The number, the text and the value of each line of a ``.jsonl`` file that is not empty; None for no JSON."""
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # the second of brackets in brackets
            value = None
        yield number, line, value


def read_calibration(path: Path) -> list[str]:
    """Calibration texts: a ``.jsonl`` file has one per line (a string, or an object with ``text``), any other is one.

    Raises:
        GPTQError: see :func:`read_text`. CalibrationError: a line of a ``.jsonl`` file is neither, or it has none.
    """
    if not path.exists():
        raise CalibrationError(
            f"{path} is not a file; expected a text file (UTF-8, or .jsonl with a text per line), or auto: names of "
            "data sets are not looked up, so save some of its text to a file, or pass --calibration auto, which needs "
            "no text"
        )
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [text]
    texts = []
    for number, _, entry in json_lines(text):
        entry = entry.get("text") if isinstance(entry, dict) else entry
        if not isinstance(entry, str):
            raise CalibrationError(f'{path}, line {number}: expected a JSON string, or an object with a string "text"')
        try:
            entry.encode()
        except UnicodeEncodeError:
            raise CalibrationError(
                f"{path}, line {number}: half of a surrogate pair (\\ud800 to \\udfff), which is not a character; "
                "remove it, or write both halves"
            ) from None
        texts.append(entry)
    if not texts:
        raise CalibrationError(
            f'{path} has no text in it; expected a JSON string, or an object with a string "text", in each line'
        )
    return texts
