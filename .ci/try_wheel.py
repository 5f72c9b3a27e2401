"""Install a wheel as a user does, where no compiler can be found, and use it; prints what took how long as JSON.

    python .ci/try_wheel.py WHEEL --torch "torch==2.13.0" --others python3.10 python3.12 python3.13

In a fresh environment of this Python: torch, then the wheel with transformers; a checkpoint in tests/data is loaded and
generates text by the ``cpu`` kernel. Other Pythons, for which there may be no torch, load the extension and call it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = "Scripts" if os.name == "nt" else "bin"  # of an environment
# What a process is started with, besides PATH; on Windows no program runs without the last ones.
KEPT = ("PIP_", "SSL_", "HTTP", "http", "HOME", "SYSTEMROOT", "TEMP", "USERPROFILE", "LOCALAPPDATA")
CHECKPOINT = ROOT / "tests" / "data" / "checkpoints" / "llama-4-32-sym"
GENERATE = f"""
import torch
from transformers import AutoModelForCausalLM
from gptq_backend import QuantLinear
model = AutoModelForCausalLM.from_pretrained({str(CHECKPOINT)!r})
ids = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
layers = [each for each in model.modules() if isinstance(each, QuantLinear)]
assert [each.kernel.name for each in layers] == ["cpu"] * 14, layers
assert ids.shape == (1, 11)
"""


def run(environment: Path, *command: str) -> float:
    """Seconds of a command of the environment, where nothing else is on PATH."""
    start = time.perf_counter()
    subprocess.run(
        [str(environment / PROGRAMS / command[0]), *command[1:]], check=True, env=_bare(environment), cwd="/"
    )
    return time.perf_counter() - start


def _bare(environment: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key.startswith(KEPT)}
    return {**kept, "PATH": str(environment / PROGRAMS), "HF_HUB_OFFLINE": "1"}


def whole(wheel: Path, torch: str) -> dict[str, float]:
    """Seconds of each step in an environment of this Python."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder)
        venv.create(environment, with_pip=True)
        pip = ["python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
        return {
            "torch": run(environment, *pip, *torch.split()),
            "wheel": run(environment, *pip, f"gptq-backend[transformers] @ {wheel.as_uri()}"),
            "version": run(environment, "gptq-backend", "--version"),
            "load and generate": run(environment, "python", "-c", GENERATE),
        }


def extension(wheel: Path, python: str) -> str:
    """The version of another Python, in whose environment the extension works."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder)
        subprocess.run([python, "-m", "venv", str(environment)], check=True)
        run(environment, "python", "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
        run(environment, "python", str(ROOT / ".ci" / "use_extension.py"))
        command = [environment / PROGRAMS / "python", "-c", "import platform; print(platform.python_version())"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _runs(python: str) -> bool:
    """Whether there is such a Python; a version manager's stand-in exists without one."""
    return shutil.which(python) is not None and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", default="torch", help="pip's arguments for torch")
    parser.add_argument("--others", nargs="*", default=[], help="other Pythons, skipped where they are missing")
    asked = parser.parse_args()
    wheel = asked.wheel.resolve()
    found = {"wheel": wheel.name, "bytes": wheel.stat().st_size, "python": sys.version.partition(" ")[0]}
    there = [python for python in asked.others if _runs(python)]
    found["extension_works_in"] = [extension(wheel, python) for python in there]
    found["not_tried"] = [python for python in asked.others if python not in there]
    found["seconds"] = whole(wheel, asked.torch)
    found["seconds_after_torch"] = sum(found["seconds"].values()) - found["seconds"]["torch"]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
