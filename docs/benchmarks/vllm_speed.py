"""Tokens per second of vLLM on a CPU, models against each other, and where the time goes.

    python docs/benchmarks/vllm_speed.py NAME=FOLDER[:QUANTIZATION[:VARIABLE=VALUE]] ... [--rounds N] [--compile]
        [--tokens N] [--json FILE]

Every model is loaded once, in a process of its own with the same options, and they take turns, so that other load on
the machine hits all of them alike. Reports the median over rounds. VARIABLE is one of the environment, for that model
alone.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gptq_backend.bench import describe_machine
from gptq_backend.locks import write_text

PROMPT = 512
CASES = ("decode", "batch 8", "prefill")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER[:QUANTIZATION[:VARIABLE=VALUE]]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="to generate per sequence")
    parser.add_argument("--compile", action="store_true", help="vLLM's default mode instead of eager")
    parser.add_argument("--json", type=Path, help="also write the figures there; rounds of earlier runs are kept")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        _child(arguments)
        return
    children = {}
    for entry in arguments.models:
        command = [sys.executable, __file__, entry, "--serve", "--tokens", str(arguments.tokens)]
        command += ["--compile"] * arguments.compile
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        _ask(child, "warm up")
        children[entry.partition("=")[0]] = child
    rates, steps = _earlier(arguments.json)
    for _ in range(arguments.rounds):
        for case in CASES:
            for name, child in children.items():
                rates[name][case].append(_ask(child, case))
    print("tokens/s".ljust(16), *(case.rjust(16) for case in CASES))
    for name, found in rates.items():
        cells = (f"{statistics.median(found[c]):8.1f} {min(found[c]):.0f}-{max(found[c]):.0f}" for c in CASES)
        print(name.ljust(16), *(cell.rjust(16) for cell in cells), flush=True)
    _write(arguments.json, rates, steps)
    if not arguments.compile:
        for name, child in children.items():
            steps[name] = {}
            for case in CASES:
                steps[name][case] = _ask(child, f"profile {case}")
                shares = ", ".join(f"{kind} {value:.2f}" for kind, value in steps[name][case].items())
                print(f"{name}, {case}, ms per step: {shares}", flush=True)
        _write(arguments.json, rates, steps)
    for child in children.values():
        child.stdin.close()  # type: ignore[union-attr]
        child.wait()


def _earlier(file: Path | None) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    rates: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    if file is None or not file.exists():
        return rates, {}
    report = json.loads(file.read_text())
    for name, cases in report["tokens/s"].items():
        rates[name].update(cases)
    return rates, report["ms per step"]


def _write(file: Path | None, rates: dict[str, Any], steps: dict[str, Any]) -> None:
    if file is None:
        return
    import vllm

    machine = describe_machine(torch.device("cpu"), " ".join(["python docs/benchmarks/vllm_speed.py", *sys.argv[1:]]))
    report = {"machine": machine, "vllm": vllm.__version__, "tokens/s": rates, "ms per step": steps}
    write_text(file, json.dumps(report, indent=1) + "\n")


def _ask(child: subprocess.Popen[str], question: str) -> Any:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(question + "\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        raise SystemExit("the engine's process died; its messages are above")
    return json.loads(line)


def _child(arguments: argparse.Namespace) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own prints must not mix with the answers
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", VLLM_CPU_KVCACHE_SPACE="1")
    from vllm import LLM

    folder, quantization, variable, value = _parts(arguments.models[0])
    if variable:
        os.environ[variable] = value
    engine = LLM(
        folder,
        quantization=quantization or None,
        enforce_eager=not arguments.compile,
        distributed_executor_backend="uni",
        dtype="bfloat16",
        max_model_len=2 * PROMPT,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    for line in sys.stdin:
        question = line.strip()
        if question == "warm up":
            answer: Any = [_rate(engine, case, 8) for case in CASES]
        elif question.startswith("profile "):
            answer = _profile(engine, question.removeprefix("profile "), arguments.tokens)
        else:
            answer = _rate(engine, question, arguments.tokens)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _parts(entry: str) -> tuple[str, str, str, str]:
    """Folder, quantization, variable and value of a model; empty if not given."""
    folder, quantization, variable = (*entry.partition("=")[2].split(":"), "", "")[:3]
    name, _, value = variable.partition("=")
    return folder, quantization, name, value


def _seconds(engine: Any, prompts: int, length: int, tokens: int) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": [5 + (i * 7 + j) % 200 for j in range(length)]} for i in range(prompts)]
    start = time.perf_counter()
    engine.generate(inputs, sampling, use_tqdm=False)
    return time.perf_counter() - start


def _rate(engine: Any, case: str, tokens: int) -> float:
    """Tokens per second; of decoding, without the first one, which comes from the prompt."""
    if case == "prefill":
        return PROMPT / _seconds(engine, 1, PROMPT, 1)
    sequences = 8 if case == "batch 8" else 1
    whole, first = _seconds(engine, sequences, 16, tokens + 1), _seconds(engine, sequences, 16, 1)
    return sequences * tokens / (whole - first)


def _profile(engine: Any, case: str, tokens: int) -> dict[str, float]:
    """Milliseconds per step by kind of module, from hooks around them."""
    spent: dict[str, float] = collections.defaultdict(float)
    kinds = {"LogitsProcessor": "head", "Attention": "attention", "RMSNorm": "norms", "SiluAndMul": "activation"}

    def watch(module: Any, kind: str) -> list[Any]:
        started: list[float] = []

        def after(*_: Any) -> None:
            spent[kind] += time.perf_counter() - started.pop()

        return [
            module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())),
            module.register_forward_hook(after),
        ]

    def watch_all(model: Any) -> list[Any]:
        handles = watch(model, "model")
        for module in model.modules():
            kind = "linear" if hasattr(module, "output_partition_sizes") else kinds.get(type(module).__name__)
            if kind and not type(module).__name__.endswith(("Embedding", "LMHead")):
                handles += watch(module, kind)
        return handles

    handles = engine.apply_model(watch_all)[0]
    steps = 1 if case == "prefill" else tokens
    whole = _seconds(engine, 8 if case == "batch 8" else 1, PROMPT if case == "prefill" else 1, steps)
    for handle in handles:
        handle.remove()
    model = spent.pop("model")
    inside = sum(value for kind, value in spent.items() if kind != "head")
    spent["rest of the model"] = model - inside
    spent["engine"] = whole - model - spent.get("head", 0.0)
    return {kind: 1000 * value / steps for kind, value in spent.items()}


if __name__ == "__main__":
    main()
