"""Which plan multiplies on this device: one that was measured on it, or an estimate.

``gptq-backend tune`` measures. Its tables are JSON files in the user's cache, a file for each kind of device and each
state of the kernels' sources. They are read once in a process, and never written by one that only multiplies: another
split of K rounds otherwise, and the ranks of tensor parallelism have to agree.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...locks import Claim, claim, write_text
from .machine_code import cache_folder
from .nvrtc import source_hash
from .plan import Plan, Shape, fits, gpu, plan

logger = logging.getLogger(__name__)

# By shape: the best plan for each number of rows that was measured.
Table = dict[Shape, dict[int, Plan | None]]

_REACH = 2  # a plan serves down to this part of the rows that it was measured with
_PATIENCE = 10.0  # seconds to wait for another process that writes


class Kind(NamedTuple):
    """Devices that share a table."""

    name: str
    capability: str
    processors: int
    shared_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> Kind:
        """That of ``device``, which has an index if it is a GPU."""
        name = "emulator" if device.type == "cpu" else torch.cuda.get_device_name(device)  # of the tests
        processors, shared_bytes, (major, minor) = gpu(device)
        return cls(name, f"{major}.{minor}", processors, shared_bytes)

    @property
    def path(self) -> Path:
        """The user's table for the kernels that are installed."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        # torch before 2.7 does not tell the shared memory: what is assumed then allows for fewer plans.
        sizes = f"{self.capability}-{self.processors}-{self.shared_bytes >> 10}k"
        return cache_folder() / f"plans-{name}-{sizes}-{source_hash()[:12]}.json"


@functools.lru_cache(4096)
def best_plan(rows: int, shape: Shape, device: torch.device) -> Plan | None:
    """The plan for x [rows, K]; None: through the dense weight.

    That of the next larger number of rows that was measured serves if it is at most twice as large; else an estimate.
    """
    reach = [count for count in _table(device).get(shape, {}) if rows <= count <= _REACH * rows]
    if reach:
        return _table(device)[shape][min(reach)]
    return plan(rows, shape.out_features, shape.tiles, shape.bits, gpu(device))


@functools.cache
def _table(device: torch.device) -> Table:
    kind = Kind.of(device)
    table = read(kind.path, kind)
    if table:
        logger.info("on %s the measured plans in %s serve", device, kind.path)
    return table


def forget() -> None:
    """Read the tables again at the next product."""
    _table.cache_clear()
    best_plan.cache_clear()


# -- files -------------------------------------------------------------------------------------------------------------


def read(path: Path, kind: Kind) -> Table:
    """The table in a file. One that is missing is empty; so is one that is bad or cannot be read, with a warning."""
    try:
        return _load(path, kind)
    except OSError as error:
        _warn(path, error)
        return {}


def _load(path: Path, kind: Kind) -> Table:
    """As :func:`read`, but raises OSError for a file that is there and cannot be read."""
    if not path.is_absolute():  # nothing is kept for a user without a home, and the working folder may be anybody's
        return {}
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")), kind)
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _warn(path, error)
        return {}


def _warn(path: Path, error: Exception) -> None:
    logger.warning(
        "the measured plans in %s are not used (%s: %s); measure again with: gptq-backend tune",
        path, type(error).__name__, error,
    )  # fmt: skip


def write(table: Table, kind: Kind) -> Path:
    """Add to the table of the user's cache; what is there for the same shape and rows is replaced -> its file.

    Raises:
        OSError: the file cannot be read or written, or another process does not stop writing it.
    """
    path = kind.path
    if not path.is_absolute():
        raise OSError("this user has no home folder; set XDG_CACHE_HOME to a folder for measured plans")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = _hold(path.with_name(f"{path.name}.lock"))  # what is read below must still be there when it is replaced
    try:
        whole = _load(path, kind)
        for shape, plans in table.items():
            whole[shape] = {**whole.get(shape, {}), **plans}
        write_text(path, _text(whole, kind))
    finally:
        held.close(remove=True)
    return path


def _hold(path: Path) -> Claim:
    """Lock a file, waiting for whoever holds it."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return claim(path)
        except BlockingIOError:
            if time.monotonic() > end:
                message = f"another process has kept {path} locked for {_PATIENCE:.0f} s; end it, then measure again"
                raise OSError(message) from None
        time.sleep(0.05)


def _text(table: Table, kind: Kind) -> str:
    """The file of a table: an entry per line."""
    entries = [
        {**shape._asdict(), "rows": rows, "plan": None if how is None else asdict(how)}
        for shape, plans in sorted(table.items())
        for rows, how in sorted(plans.items())
    ]
    lines = ",\n".join(map(json.dumps, entries))
    header = json.dumps({**kind._asdict(), "sources": source_hash()})[:-1]
    return f'{header}, "plans": [\n{lines}\n]}}\n'


def _parse(content: Mapping[str, Any], kind: Kind) -> Table:
    """Raises ValueError, KeyError or TypeError for what :func:`write` does not write for this kind of device."""
    expected = {**kind._asdict(), "sources": source_hash()}
    for key, value in expected.items():
        if content[key] != value:
            raise ValueError(f"{key} is {content[key]!r}, expected {value!r}")
    table: Table = {}
    for entry in content["plans"]:
        shape, rows = Shape(*(_number(entry[key]) for key in Shape._fields)), _number(entry["rows"])
        fields = entry["plan"]
        how = None if fields is None else Plan(**{key: _number(value) for key, value in fields.items()})
        if not fits(how, shape.tiles, shape.bits, kind.shared_bytes):
            raise ValueError(f"{how} cannot multiply by {shape}")
        table.setdefault(shape, {})[rows] = how
    return table


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a number of something")
    return value
