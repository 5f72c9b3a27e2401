"""Use the wheel in the oldest and the newest versions of Python, torch and transformers; prints a table.

    python .ci/try_versions.py WHEEL --json docs/benchmarks/versions.json
    python .ci/try_versions.py --table docs/benchmarks/versions.json

Each combination gets a fresh environment, the wheel, and ``.ci/smoke.py``; then the environment is removed. Where
pip has only a build of torch for CUDA, that is taken: 6 GB, one at a time. A combination whose Python is missing is
skipped, and the table says so. Ends with an error if one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from email import message_from_string
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

SMOKE = Path(__file__).resolve().with_name("smoke.py")
COLUMNS = ("python", "torch", "build", "transformers", "accelerate", "safetensors", "numpy", "result")


class Combination(NamedTuple):
    """What to install; ``lowest``: of everything else that the wheel needs, the oldest that it allows."""

    python: str
    torch: str
    transformers: str
    lowest: bool = False


def combinations(torch: str) -> list[Combination]:
    """The oldest, ``torch`` with the oldest and the newest transformers in this Python, and the newest."""
    return [
        Combination("python3.10", "torch==2.6.0", "transformers==4.56.0", lowest=True),
        Combination(sys.executable, torch, "transformers==4.56.0"),
        Combination(sys.executable, torch, "transformers==5.24.0"),
        Combination("python3.14", "torch==2.15.0", "transformers==5.24.0"),
    ]


def try_one(wheel: Path, each: Combination) -> dict[str, object]:
    """The versions that were there, the seconds of each step, and how it went."""
    asked = {name: text.partition("==")[2] or text for name, text in each._asdict().items() if name != "lowest"}
    if (python := find_python(each.python)) is None:
        return {**asked, "result": "not tried: no such Python"}
    with tempfile.TemporaryDirectory() as folder:
        # pip of this Python installs for the other, which may come without one.
        subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
        inside = str(Path(folder, "bin", "python"))
        pip = [sys.executable, "-m", "pip", "--python", inside, "install", "--quiet", "--only-binary", ":all:"]
        wanted = [f"gptq-backend[transformers] @ {wheel.as_uri()}", *each.torch.split(), each.transformers]
        environment = {**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        steps = {
            "install": [*pip, *wanted, *(lowest(wheel) if each.lowest else [])],
            "smoke": [inside, str(SMOKE)],
        }
        seconds = {}
        for step, command in steps.items():
            start = time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            seconds[step] = round(time.perf_counter() - start, 1)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return {**asked, "seconds": seconds, "result": f"{step} failed: {done.stderr.strip().splitlines()[-1]}"}
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": seconds, "result": "works"}


def find_python(name: str) -> str | None:
    """The interpreter of that name, or None; a version manager's stand-in exists without one."""
    found = shutil.which(name)
    runs = found is not None and subprocess.run([found, "-c", "import venv"], capture_output=True).returncode == 0
    return found if runs else None


def lowest(wheel: Path) -> list[str]:
    """pip's arguments for the lower bounds in the wheel's metadata, but those of torch and transformers."""
    with ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(name).decode())
    bound = re.compile(r"([\w-]+)>=([\w.]+)(; extra == .transformers.)?")
    found = [each for line in metadata.get_all("Requires-Dist", []) if (each := bound.fullmatch(line))]
    return [f"{each[1]}=={each[2]}" for each in found if each[1] not in ("torch", "transformers")]


def table(records: list[dict[str, object]]) -> str:
    """The records in Markdown."""
    rows = [COLUMNS, *([each.get(column, "") for column in COLUMNS] for each in records)]
    head, *lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([head, "|---" * len(COLUMNS) + "|", *lines])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?")
    parser.add_argument("--torch", default="torch==2.13.0", help="pip's arguments for the torch between the ends")
    parser.add_argument("--json", type=Path, help="also write the records there")
    parser.add_argument("--table", type=Path, help="only print the table of such records")
    parser.add_argument("--only", default="", help="combinations in whose text this is, e.g. python3.13")
    asked = parser.parse_args()
    if asked.table:
        print(table(json.loads(asked.table.read_text())))
        return
    if asked.wheel is None:
        parser.error("the wheel to try is missing")
    wheel = asked.wheel.resolve()
    records = []
    for each in combinations(asked.torch):
        if asked.only in " ".join(each[:3]):
            print(f"trying {each.python}, {each.torch}, {each.transformers}", file=sys.stderr)
            records.append(try_one(wheel, each))
    print(table(records))
    if asked.json:
        asked.json.write_text(json.dumps(records, indent=1) + "\n")
    if failed := [each for each in records if "failed" in str(each["result"])]:
        sys.exit(f"{len(failed)} of {len(records)} combinations failed")


if __name__ == "__main__":
    main()
