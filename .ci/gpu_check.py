"""Are the GPU kernels right and fast on this machine's GPU? As much of the answer as fifteen minutes give.

    python .ci/gpu_check.py docs/benchmarks/gpu/check.jsonl [--peer MODULE:FUNCTION] [--wheels FOLDER] [--dry-run]

Steps run in order of value, each in a process of its own under its own limit; those of one phase run at the same time.
The file gets one line of JSON for each step when it ends, and one for each row that a step prints. So nothing is lost
when the machine goes away. A rerun leaves out what passed with the same sources on the same device. No network is used,
and nothing is installed but wheels of FOLDER, beside the results of the build.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.machinery
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu-check"
SITE = BUILD / "site"  # the wheels
ALL_SECONDS = 900
SOURCES = "gptq_backend/kernels", "gptq_backend/algorithm", "csrc", "tests/gpu", "setup.py"
SUFFIXES = {".py", ".h", ".cuh", ".cu", ".cpp"}

PYTHON = "{python}"  # placeholders, so that a command is the same on every machine
JSON = "{json}"
CLI = PYTHON, "-m", "gptq_cli"
PYTEST = PYTHON, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"
CUDA_TESTS, TRITON_TESTS = "tests/gpu/test_cuda.py", "tests/kernels/test_triton.py"
DESCRIBE = """
import json, sys, torch
device = torch.device(sys.argv[1])
found = {"device": "cpu", "torch": torch.__version__}
if device.type == "cuda":
    found["device"] = torch.cuda.get_device_name(device)
    found["capability"] = torch.cuda.get_device_capability(device)
print(json.dumps(found))
"""
LOAD = """
import sys
from gptq_backend.kernels.cuda import loading
sys.exit(loading.unfit(0, int(sys.argv[1])))
"""
COMPILE = """
import sys
from gptq_backend.kernels.cuda.nvrtc import find_compiler
print(len(find_compiler().compile(int(sys.argv[1]), "sm_90")), "bytes")
"""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        limit: seconds. dry: what a dry run does instead, the same command if None, or why it does nothing. needs:
        modules without which it is skipped. once: False for what a new machine needs, whatever the file says.
    """

    name: str
    limit: float
    command: tuple[str, ...]
    dry: tuple[str, ...] | str | None = None
    needs: tuple[str, ...] = ()
    once: bool = True


Phase = list[Step]


# -- what is done ------------------------------------------------------------------------------------------------------


def plan(peers: Sequence[str] = (), wheels: str | None = None) -> list[Phase]:
    """All phases, the most valuable first."""
    found: list[Phase] = []
    if wheels is not None:
        pip = (PYTHON, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(SITE))
        files = sorted(str(path) for path in Path(wheels).glob("*.whl"))
        found.append([Step("wheels", 15, (*pip, *files), once=False)])
    build = PYTHON, "setup.py", "-q", "build_ext", "--inplace"
    built = (
        PYTHON,
        "-c",
        "import gptq_backend._cpu, gptq_backend._cuda",
    )  # a machine of few cores takes minutes to build
    found.append([Step("build", 100, build, built, once=False)])
    found.append([_machine_code(bits) for bits in (4, 8, 3, 2)])
    found.append([_doctor(), *_cuda_tests()])
    found += [[_plans(shape)] for shape in ("4096x4096", "8192x8192", "22016x4096")]
    found.append([_gemm("gemm-cuda", 60, "fp16", "cuda", "1,4,16,64,128,256,512", peers)])
    found.append([_gemm("gemm-triton", 80, "fp16", "triton", "1,16,64,256")])
    found.append([_decode()])
    found.append([_gemm("gemm-triton-bf16", 50, "bf16", "triton", "1,16,64")])
    found.append(_triton_tests())
    found.append([_quantize()])
    return found


def _machine_code(bits: int) -> Step:
    """Compiles for this GPU, into the user's cache, and loads."""
    dry = (PYTHON, "-c", COMPILE, "4") if bits == 4 else "4 bits show that NVRTC works"
    return Step(f"machine-code-{bits}", 50, (PYTHON, "-c", LOAD, str(bits)), dry, once=False)


def _doctor() -> Step:
    """Triton compiles for long; a row that takes longer counts as hanging, and the others are still written."""

    def command(device: str) -> tuple[str, ...]:
        return *CLI, "doctor", "--device", device, "--seconds", "80", "--json", JSON

    return Step("doctor", 150, command("cuda"), command("cpu"))


def _cuda_tests() -> Iterator[Step]:
    """Every test in tests/gpu, in processes that take about as long as each other."""
    yield Step("tests-tiny", 60, (*PYTEST, CUDA_TESTS, "-k", "tiny or plan or choose"))
    for bits in (4, 8, 3, 2):
        for act_order in (False, True):
            chosen = f"every_bucket and [{act_order}- and -{bits}]"
            order = "-act-order" if act_order else ""
            yield Step(f"tests-buckets-{bits}{order}", 150, (*PYTEST, CUDA_TESTS, "-k", chosen))
    rest = "not tiny and not plan and not choose and not every_bucket"
    yield Step("tests-rest", 150, (*PYTEST, CUDA_TESTS, "-k", rest))
    yield Step("tests-quantize", 150, (*PYTEST, "tests/gpu/test_quantize.py"))


def _triton_tests() -> Phase:
    chosen = {str(bits): f"float64 and -{bits}]" for bits in (4, 8, 3, 2)} | {"rest": "experts or repeats"}
    return [Step(f"tests-triton-{name}", 80, (*PYTEST, TRITON_TESTS, "-k", which)) for name, which in chosen.items()]


def _plans(shape: str) -> Step:
    measure = PYTHON, "docs/benchmarks/launch_plans.py", "-", "--shape", shape, "--m", "1,16,64,128,256,512"
    return Step(f"plans-{shape}", 45, measure, "it times plans of the CUDA kernels")


def _gemm(name: str, limit: float, dtype: str, backend: str, rows: str, peers: Sequence[str] = ()) -> Step:
    """A 7B's layers, beside ``F.linear``."""
    more = [part for peer in peers for part in ("--peer", peer)]
    end = "--dtype", dtype, *more, "--json", JSON
    what = "--device", "cuda", "--shapes", "llama2-7b", "--m", rows, "--seconds", "0.03", "--backend", backend
    tiny = "--device", "cpu", "--shape", "64x128", "--m", "1,2", "--seconds", "0.01"
    return Step(name, limit, (*CLI, "bench", "gemm", *what, *end), (*CLI, "bench", "gemm", *tiny, *end))


def _decode() -> Step:
    command = PYTHON, "docs/benchmarks/decode_shape.py", JSON
    size = "--prompt", "128", "--new-tokens", "32"
    tiny = "--prompt", "8", "--new-tokens", "4", "--repeats", "1", "--shape", "tiny", "--device", "cpu"
    return Step("decode-7b", 80, (*command, *size), (*command, *tiny), needs=("transformers",))


def _quantize() -> Step:
    bench = *CLI, "bench", "quantize", "--json", JSON
    dry = *bench, "--shape", "tiny", "--samples", "4", "--seqlen", "32", "--device", "cpu"
    command = *bench, "--shape", "llama2-7b", "--blocks", "2", "--samples", "32", "--device", "cuda"
    return Step("quantize-7b", 90, command, dry, needs=("greenlet", "transformers"))


def planned_seconds(phases: Iterable[Phase]) -> float:
    """Of all limits; the steps of a phase run at the same time."""
    return sum(max(step.limit for step in phase) for phase in phases)


def importable(name: str) -> bool:
    """Whether there is a module or package, without importing it; folders of the wheels and the tree count."""
    path = [str(SITE), os.getcwd(), *sys.path]
    return importlib.machinery.PathFinder.find_spec(name.partition(".")[0], path) is not None


# -- the file ----------------------------------------------------------------------------------------------------------


class Results:
    """The file of results: only ever appended to, a whole line at a time.

    Args:
        key: what results depend on beside the command; a step of another key is not done.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path, self.key = path, json.loads(json.dumps(key))
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # the machine went away while it wrote
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def add(self, line: dict[str, Any]) -> None:
        text = json.dumps({**line, "key": self.key}) + "\n"
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def passed(self) -> set[tuple[str, tuple[str, ...]]]:
        """Names and commands of the steps that need not run again."""
        found = set()
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:  # cut off
                continue
            if line["key"] == self.key and line.get("state") == "passed":
                found.add((line["step"], tuple(line["command"])))
        return found


def source_hash() -> str:
    """Of what right results and times depend on."""
    found = hashlib.sha256()
    for place in SOURCES:
        path = ROOT / place
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in SUFFIXES:
                found.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def describe(device: str) -> dict[str, Any]:
    """The device by torch, in a process of its own: the first use of a broken driver may never end."""
    command = [sys.executable, "-c", DESCRIBE, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        sys.exit(f"torch did not answer for {device} within a minute; see whether nvidia-smi does")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        sys.exit(f"torch cannot use {device} here ({reason}); --dry-run tries every step on the CPU")
    return json.loads(done.stdout)


# -- running -----------------------------------------------------------------------------------------------------------


class Runner:
    """Runs steps until ``seconds`` are over."""

    def __init__(self, results: Results, seconds: float, dry: bool, say: Callable[[str], object] | None = None) -> None:
        self.results, self.dry, self.say = results, dry, say or write_line
        self.end = time.monotonic() + seconds
        self.running: set[subprocess.Popen[str]] = set()

    def run(self, phases: Iterable[Phase]) -> list[str]:
        """All phases -> the names of the steps that did not pass."""
        done, bad = self.results.passed(), []
        for phase in phases:
            # On a GPU all steps of a phase at once, each under the limit of the phase; a dry run has a small machine.
            with ThreadPoolExecutor(2 if self.dry else len(phase)) as pool:
                states = list(pool.map(lambda step: self.step(step, done), phase))
            bad += [step.name for step, state in zip(phase, states) if state not in ("passed", "done", "skipped")]
        return bad

    def step(self, step: Step, done: set[tuple[str, tuple[str, ...]]]) -> str:
        """Run one step, unless there is a reason not to, and write what became of it -> its state."""
        command = step.command if not self.dry or step.dry is None else step.dry
        missing = [name for name in step.needs if not importable(name)]
        left = min(step.limit, self.end - time.monotonic())
        if step.once and (step.name, command) in done:
            self.say(f"{'done':<10}{step.name}")
            return "done"
        if isinstance(command, str) or missing:
            line = {"state": "skipped", "reason": f"{', '.join(missing)} not installed" if missing else command}
        elif left < 1:
            line = {"state": "no time", "reason": "the time of the whole run was over"}
        else:
            line = {"command": command, "limit": round(left, 1), **self.execute(step.name, command, left)}
        self.results.add({"step": step.name, **line})
        seconds = f"{line['seconds']:6.1f} s of {left:.0f}" if "seconds" in line else ""
        self.say(f"{line['state']:<10}{step.name:<28}{seconds}{line.get('reason', '')}")
        for text in line.get("tail", ()) if line["state"] != "passed" else ():
            self.say(f"    {text}")
        return str(line["state"])

    def execute(self, name: str, command: Sequence[str], limit: float) -> dict[str, Any]:
        """Run a command in a process group of its own, which ends with it or at its limit."""
        BUILD.mkdir(parents=True, exist_ok=True)
        target = BUILD / f"{name}.json"
        target.unlink(missing_ok=True)
        places = {PYTHON: sys.executable, JSON: str(target)}
        start, tail, late = time.monotonic(), deque[str](maxlen=40), threading.Event()
        process = subprocess.Popen(
            [places.get(part, part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=environment(),
            start_new_session=True,
        )
        self.running.add(process)
        timer = threading.Timer(limit, lambda: (late.set(), kill(process)))
        timer.start()
        try:
            assert process.stdout is not None
            for text in process.stdout:
                if (row := parse_row(text)) is not None:
                    self.results.add({"step": name, "row": row})
                else:
                    tail.append(text.rstrip()[:300])
            code = process.wait()
        finally:
            timer.cancel()
            kill(process)
            self.running.discard(process)
        state = "timed out" if late.is_set() else "failed" if code else "passed"
        found = {"state": state, "code": code, "seconds": round(time.monotonic() - start, 1), "tail": [*tail]}
        with contextlib.suppress(OSError, ValueError):  # it wrote none, or died while it did
            found["result"] = json.loads(target.read_text(encoding="utf-8"))
        return found

    def stop(self, *_: object) -> None:
        """For a signal: the steps are in sessions of their own, and would go on."""
        for process in [*self.running]:
            kill(process)
        os._exit(1)


def environment() -> dict[str, str]:
    """Of every step: the tree first, then the wheels, then what the caller has."""
    path = os.pathsep.join(
        filter(None, map(str, (ROOT, ROOT / "integrations", SITE, os.environ.get("PYTHONPATH", ""))))
    )
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "GPTQ_BACKEND_REQUIRE_NATIVE": "1"}


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def write_line(text: str) -> None:
    """Like print, but a whole line at a time: steps of a phase end at the same time."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parse_row(text: str) -> Any:
    """The object in a line of JSON, None for any other line."""
    try:
        return json.loads(text) if text.startswith("{") else None
    except ValueError:
        return None


# -- the command -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="file of results, appended to")
    parser.add_argument("--peer", action="append", default=[], help="as of `bench gemm`; left out if not importable")
    parser.add_argument("--wheels", help="folder of wheels that the interpreter lacks, e.g. greenlet")
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, help="of the whole run")
    parser.add_argument("--dry-run", action="store_true", help="every step in a tiny form on the CPU")
    asked = parser.parse_args()
    peers = [peer for peer in asked.peer if importable(peer.partition(":")[0])]
    for peer in set(asked.peer) - set(peers):
        print(f"peer {peer} is left out: there is no such module")
    phases = plan(peers, asked.wheels)
    for phase in phases:
        print(f"{max(step.limit for step in phase):5.0f} s  {', '.join(step.name for step in phase)}")
    print(f"{planned_seconds(phases):5.0f} s  at most, and no more than {asked.seconds:g} s", flush=True)
    begin = time.monotonic()
    key = {**describe("cpu" if asked.dry_run else "cuda"), "sources": source_hash(), "dry": asked.dry_run}
    print(shlex.join(f"{name}={value}" for name, value in key.items()), flush=True)
    runner = Runner(Results(asked.target, key), asked.seconds - (time.monotonic() - begin), asked.dry_run)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, runner.stop)
    bad = runner.run(phases)
    print(f"{asked.target} after {time.monotonic() - begin:.0f} s" + (f"; not passed: {', '.join(bad)}" if bad else ""))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
