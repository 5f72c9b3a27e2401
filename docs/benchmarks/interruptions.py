"""What is left when `gptq-backend quantize` is interrupted at random moments: kill -9, Ctrl-C, SIGTERM, SIGHUP.

    python docs/benchmarks/interruptions.py --moments 800 --disks normal --json normal.json

Each run is the real command on a tiny model with random weights, in a process forked from one that has imported torch
already. Half of the moments are random in time, the other half random among the run's file operations (which are few,
and where it matters). OUT holds an older checkpoint, which --overwrite may replace, or nothing. After each interruption

- OUT must be what it was or the new checkpoint, bit for bit;
- the same command again must end well and give the same bits as a run that nothing disturbed;
- beside OUT and in the folder for temporary files nothing may be left then.

On the full disk (a tmpfs, for which root is needed) the space that is free during the run is random, too, from nothing
to enough. "no swap" is a disk on which two names cannot be swapped in one step (stood in for by turning that off):
there OUT may be missing after a kill, if the next command puts it back.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import torch
from forked import SIGNALS, Operations, forked

import gptq_cli
import gptq_cli.app
import gptq_cli.quantize_command
from gptq_backend import __version__
from gptq_backend import output_folder as output

TIERS = {
    "rtn": ["--rtn"],
    "fast": ["--quality", "fast"],
    "default": ["--quality", "default"],
    "best": ["--quality", "best"],
}
DISKS = ("normal", "full", "no swap")


@dataclass
class Row:
    """Counts of one disk and one signal: how the interrupted runs ended, what OUT was, and what was left over."""

    disk: str
    signal: str
    moments: int = 0
    interrupted: int = 0
    finished: int = 0
    disk_full: int = 0
    old: int = 0
    new: int = 0
    nothing: int = 0
    put_back: int = 0
    with_leftovers: int = 0
    cleared: int = 0
    same_bits: int = 0
    tiers: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))


class Bench:
    """A model, a text, and for each tier what an undisturbed run gives."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.temporary = scratch, scratch / "tmp"
        self.temporary.mkdir()
        self.model, self.text, self.log = scratch / "model", scratch / "text.txt", scratch / "log.txt"
        forked(self._make_model, self.log)
        self.expected: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.events: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def _make_model(self) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        words = [f"w{i}" for i in range(120)]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, "<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(self.model)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(self.model)
        self.text.write_text(" ".join(random.Random(0).choices(words, k=600)))

    def command(self, tier: str, folder: Path) -> list[str]:
        """The command; OUT and the JSON lie in ``folder``."""
        how = TIERS[tier]
        if tier != "rtn":
            how = [*how, "--calibration", str(self.text), "--samples", "4", "--seqlen", "16", "--batch-size", "1"]
        names = [str(self.model), str(folder / "out"), "--json", str(folder / "out.json"), "--overwrite"]
        return ["quantize", *names, "--group-size", "16", "--kld-windows", "2", *how]

    def preload(self) -> None:
        """Import here what a run imports, so that the runs forked from here spend their time on the work."""
        folder, names = self.scratch / "first", self.scratch / "modules"
        folder.mkdir()
        self.run("fast", folder, at_end=lambda: names.write_text("\n".join(sys.modules)))
        for name in names.read_text().split():
            with suppress(ImportError):
                importlib.import_module(name)
        shutil.rmtree(folder)

    def measure(self, tier: str) -> None:
        """An undisturbed run."""
        folder = self.scratch / f"clean-{tier}"
        folder.mkdir()
        counts = self.scratch / "events"
        begun = time.perf_counter()
        operations = Operations(self.scratch)
        code = self.run(tier, folder, operations.watch, at_end=lambda: counts.write_text(str(operations.count)))
        if code:
            raise SystemExit(f"the undisturbed run failed ({code}):\n{self.log.read_text()}")
        self.seconds[tier] = time.perf_counter() - begun
        self.events[tier] = int(counts.read_text())
        self.expected[tier] = digest(folder / "out")
        self.bytes[tier] = sum(path.stat().st_size for path in (folder / "out").rglob("*"))
        shutil.rmtree(folder)

    def run(
        self,
        tier: str,
        folder: Path,
        before: Callable[[], None] = lambda: None,
        at_end: Callable[[], Any] = lambda: None,
        kill: tuple[float, int] | None = None,
        overwrite: bool = True,
    ) -> int:
        """The command in a process of its own -> its exit code, or minus the signal that ended it.

        Args:
            before, at_end: called in that process.
            kill: seconds after which which signal is sent.
        """
        arguments = [word for word in self.command(tier, folder) if overwrite or word != "--overwrite"]

        def work() -> None:
            os.environ["TMPDIR"] = tempfile.tempdir = str(self.temporary)
            sys.argv = ["gptq-backend", *arguments]
            before()
            try:
                gptq_cli.main()
            finally:
                at_end()

        return forked(work, self.log, kill)


def digest(folder: Path) -> str:
    """Of all files but the reports and the card, which hold times; "nothing" for none."""
    if not os.path.lexists(folder):
        return "nothing"
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "quantize_report" not in path.name and path.name != "README.md":
            found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()


@contextmanager
def disk(kind: str, bench: Bench) -> Iterator[Path]:
    """A folder on a disk of that kind."""
    folder = Path(tempfile.mkdtemp(prefix="disk-", dir=bench.scratch))
    if kind != "full":
        yield folder
        shutil.rmtree(folder)
        return
    size = 4 * max(bench.bytes.values()) + (4 << 20)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def moment(bench: Bench, row: Row, folder: Path, tier: str, draw: random.Random) -> list[str]:
    """Interrupt one run, look, run again, look -> what is wrong."""
    out, number = folder / "out", SIGNALS[row.signal]
    before = set_up(bench, row, folder, tier, draw)
    no_swap = row.disk == "no swap"

    def prepare(step: int = 0) -> None:
        if no_swap:
            output.exchange = lambda *_: False
        if step:
            Operations(bench.scratch, step, number).watch()

    if draw.random() < 0.5:
        kill = draw.uniform(0, 1.05 * bench.seconds[tier]), number
        code, when = bench.run(tier, folder, prepare, kill=kill), f"after {kill[0]:.3f} s"
    else:
        step = draw.randint(1, bench.events[tier])
        code, when = bench.run(tier, folder, lambda: prepare(step)), f"at operation {step} of {bench.events[tier]}"
    case = f"{row.disk} disk, {row.signal}, {tier}, {when}, exit {code}"
    row.moments += 1
    row.tiers[tier] += 1
    wrong = judge_exit(bench, row, code, number)
    (folder / "filler").unlink(missing_ok=True)
    if no_swap and digest(out) == "nothing" != before:
        row.put_back += 1
        code = bench.run(tier, folder, prepare, overwrite=False)
        said = " ".join(bench.log.read_text().split())  # lines are wrapped
        if code != 1 or "the old folder was put back" not in said or digest(out) != before:
            wrong.append(f"OUT was not put back: {said[-800:]}")
    wrong += judge_output(row, out, before, bench.expected[tier])
    left = leftovers(bench, folder)
    row.with_leftovers += bool(left)
    again = bench.run(tier, folder, prepare)
    same = again == 0 and digest(out) == bench.expected[tier]
    row.same_bits += same
    if not same:
        wrong.append(f"the run after it exits {again}, or gives other bits: {bench.log.read_text()[-1500:]}")
    still = leftovers(bench, folder)
    row.cleared += bool(left) and not still
    if still:
        wrong.append(f"{still} is left after the next run, of {left}")
    return [f"{case}: {sentence}" for sentence in wrong]


def set_up(bench: Bench, row: Row, folder: Path, tier: str, draw: random.Random) -> str:
    """Put an older checkpoint at OUT, or not, and fill the disk, if it is to be full -> what OUT is."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if draw.random() < 0.7:
        shutil.copytree(bench.model, folder / "out")
    if row.disk == "full":
        room = int(draw.uniform(0, 1.5) * bench.bytes[tier])
        (folder / "filler").write_bytes(b"\0" * max(0, shutil.disk_usage(folder).free - room))
    return digest(folder / "out")


def judge_exit(bench: Bench, row: Row, code: int, number: int) -> list[str]:
    """How the run ended -> what is wrong with that."""
    said = bench.log.read_text()
    row.finished += code == 0
    row.interrupted += code in (128 + number, -number)
    if code == 1 and row.disk == "full":
        row.disk_full += 1
        last = said.splitlines()[-1]
        return [] if last.startswith("error: ") and "no space left" in last else [f"not about the disk: {said[-400:]}"]
    return [] if code in (0, 128 + number, -number) else [f"unexpected exit: {said[-1500:]}"]


def judge_output(row: Row, out: Path, before: str, new: str) -> list[str]:
    """What OUT is -> what is wrong with that."""
    now = digest(out)
    row.old += now == before != "nothing"
    row.new += now == new
    row.nothing += now == before == "nothing"
    if (result := out.with_name("out.json")).exists():
        json.loads(result.read_text())
    if now in (before, new):
        return []
    return [f"OUT is neither old nor new but {sorted(str(path.relative_to(out)) for path in out.rglob('*'))}"]


def leftovers(bench: Bench, folder: Path) -> list[str]:
    """What lies beside OUT and its JSON, in it beside its files, and in the folder for temporary files."""
    beside = [path.name for path in folder.iterdir() if path.name not in ("out", "out.json")]
    inside = [path.name for path in folder.glob("out/.*")]
    return sorted([*beside, *inside, *(path.name for path in bench.temporary.iterdir())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=200, help="of each disk, over all signals and tiers")
    parser.add_argument("--disks", nargs="*", choices=DISKS, default=DISKS)
    parser.add_argument("--tiers", nargs="*", choices=list(TIERS), default=list(TIERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the counts")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    draw, rows, wrong = random.Random(asked.seed), [], []
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="interruptions-") as scratch:
        bench = Bench(Path(scratch))
        bench.preload()
        for tier in asked.tiers:
            bench.measure(tier)
            print(f"{tier}: {bench.seconds[tier]:.2f} s, {bench.events[tier]} file operations", flush=True)
        for kind in asked.disks:
            made = {name: Row(kind, name) for name in SIGNALS}
            with disk(kind, bench) as folder:
                for i in range(asked.moments):
                    row = list(made.values())[i % len(made)]
                    tier = asked.tiers[i // len(made) % len(asked.tiers)]
                    found = moment(bench, row, folder, tier, draw)
                    wrong += found
                    for sentence in found:
                        print(f"WRONG: {sentence}", flush=True)
            rows += made.values()
            for row in made.values():
                print(row, flush=True)
    result = {
        "gptq_backend": __version__,
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()}",
        "seed": asked.seed,
        "seconds": round(time.perf_counter() - begun),
        "undisturbed_seconds": {tier: round(value, 2) for tier, value in bench.seconds.items()},
        "rows": [asdict(row) for row in rows],
        "wrong": wrong,
    }
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
