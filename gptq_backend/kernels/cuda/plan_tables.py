"""Which plan multiplies on this device: one measured on it, one measured on its like and shipped, or an estimate.

``gptq-backend tune`` measures. Its tables are JSON files in the user's cache, a file for each kind of device and each
state of the kernels' sources. They are read once in a process, and never written by one that only multiplies: another
split of K rounds otherwise, and the ranks of tensor parallelism have to agree.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...locks import write_text
from .machine_code import cache_folder
from .nvrtc import source_hash
from .plan import Plan, Shape, fits, machine, plan

logger = logging.getLogger(__name__)

# By shape: the best plan for each number of rows that was measured.
Table = dict[Shape, dict[int, Plan | None]]

SHIPPED = Path(__file__).with_name("plans")


class Kind(NamedTuple):
    """Devices that share a table."""

    name: str
    capability: str
    processors: int
    shared_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> Kind:
        """That of ``device``, which has an index if it is a GPU."""
        if device.type == "cpu":  # the emulator of the tests
            return cls("emulator", "0.0", *machine(device))
        major, minor = torch.cuda.get_device_capability(device)
        return cls(torch.cuda.get_device_name(device), f"{major}.{minor}", *machine(device))

    @property
    def path(self) -> Path:
        """The user's table for the kernels that are installed."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return cache_folder() / f"plans-{name}-{self.capability}-{self.processors}-{source_hash()[:12]}.json"


@functools.lru_cache(4096)
def best_plan(rows: int, shape: Shape, device: torch.device) -> Plan | None:
    """The plan for x [rows, K]; None: through the dense weight.

    Between two numbers of rows that were measured, the plan for the larger serves; above the largest, an estimate does.
    """
    for table in _tables(device):
        measured = table.get(shape, {})
        if measured and rows <= max(measured):
            return measured[min(count for count in measured if count >= rows)]
    return plan(rows, shape.out_features, shape.tiles, shape.bits, *machine(device))


@functools.cache
def _tables(device: torch.device) -> tuple[Table, ...]:
    kind = Kind.of(device)
    return read(kind.path, kind), read(SHIPPED / kind.path.name, kind)


def forget() -> None:
    """Read the tables again at the next product."""
    _tables.cache_clear()
    best_plan.cache_clear()


# -- files -------------------------------------------------------------------------------------------------------------


def read(path: Path, kind: Kind) -> Table:
    """The table in a file. One that is missing is empty; so is a bad one, with a warning."""
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")), kind)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning(
            "the measured plans in %s are not used (%s: %s); measure again with: gptq-backend tune",
            path, type(error).__name__, error,
        )  # fmt: skip
        return {}


def write(table: Table, kind: Kind) -> Path:
    """Add to the table of the user's cache; what is there for the same shape is replaced -> its file.

    Raises:
        OSError: the file cannot be written.
    """
    path = kind.path
    if not path.is_absolute():
        raise OSError("this user has no home folder; set XDG_CACHE_HOME to a folder for measured plans")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    whole = {**read(path, kind), **table}
    entries = [
        {**shape._asdict(), "rows": rows, "plan": None if how is None else asdict(how)}
        for shape, plans in sorted(whole.items())
        for rows, how in sorted(plans.items())
    ]
    lines = ",\n".join(map(json.dumps, entries))
    header = json.dumps({**kind._asdict(), "sources": source_hash()})[:-1]
    write_text(path, f'{header}, "plans": [\n{lines}\n]}}\n')
    return path


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
