"""Train a LoRA on top of a quantized model with trl, on a CPU, and compare with the same on the 16-bit model.

    pip install "gptq-backend[peft]" trl
    python docs/examples/finetune.py demo-output/smollm2-135m-gptq-4bit-g64 demo-output/smollm2-135m

`make demo` makes these two folders. The text is a play that is packaged with gptq_transformers; its end is held out.
Each model is trained in a process of its own, and they take turns step by step, so that both meet the same machine.
finetune.json gets all losses, times and the peak of memory, finetune.svg the losses as a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TEXT = Path(__file__).resolve().parents[2] / "integrations" / "gptq_transformers" / "calibration_text" / "dialogue.txt"
TOKENS, BATCH = 128, 2
COLORS = ("#2563eb", "#9ca3af")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", default="float32", help="of activations and dense weights (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("finetune.json"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train(options.models[0], options.steps, options.dtype, Turns())
        return
    results = in_turns(options.models, ["--steps", str(options.steps), "--dtype", options.dtype])
    for name, found in results.items():
        print(
            f"{name}: held-out loss {found['before']:.3f} -> {found['after']:.3f}, "
            f"{found['seconds_per_step']:.2f} s per step, peak memory {found['peak_mb']} MB"
        )
    options.json.write_text(json.dumps({"steps": options.steps, "dtype": options.dtype, "models": results}, indent=1))
    options.json.with_suffix(".svg").write_text(picture({name: each["losses"] for name, each in results.items()}))


def in_turns(folders: list[Path], settings: list[str]) -> dict[str, dict[str, Any]]:
    """What :func:`train` finds for each of ``folders``; one process works at a time."""
    results: dict[str, dict[str, Any]] = {}
    waiting = []
    for folder in folders:
        command = [sys.executable, __file__, "--one", str(folder), *settings]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        waiting.append((folder.name, child))
        take_turn(child)  # until it is about to take its first step
    while waiting:
        for name, child in [*waiting]:
            if (result := take_turn(child, "go")) is not None:
                results[name] = result
                waiting.remove((name, child))
    return results


def take_turn(child: Any, message: str = "") -> Any:
    """Let a process that waits go on, until it waits again or is done -> its result, or None."""
    if message:
        child.stdin.write(f"{message}\n")
        child.stdin.flush()
    answer = child.stdout.readline()
    if not answer:
        raise SystemExit("a training process ended early; its messages are above")
    return json.loads(answer)


class Turns:
    """A process's side of :func:`take_turn`, and the seconds of each step. Other prints go to stderr from now on."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.start, self.seconds = 0.0, list[float]()

    def answer(self, result: Any = None) -> None:
        self.answers.write(json.dumps(result) + "\n")
        self.answers.flush()

    def begin(self) -> None:
        self.answer()
        if not sys.stdin.readline():
            raise SystemExit("nobody waits for this process any more")
        self.start = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def train(folder: Path, steps: int, dtype: str, turns: Turns) -> None:
    """Answers with the losses of each step, and with those before and after on text that was held out."""
    import torch
    import transformers
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    chunks = text_chunks(tokenizer)
    held_out = len(chunks) // 10
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        train_dataset=dataset(chunks[:-held_out]),
        eval_dataset=dataset(chunks[-held_out:]),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=steps,
            max_length=TOKENS,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=5e-4,
            warmup_steps=5,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.add_callback(callback(turns))
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    result = {
        "before": before,
        "after": trainer.evaluate()["eval_loss"],
        "losses": losses,
        "seconds_per_step": statistics.median(turns.seconds),
        "seconds_25_75": statistics.quantiles(turns.seconds, n=4)[::2],
        "threads": torch.get_num_threads(),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    turns.answer(result)


def text_chunks(tokenizer: Any) -> list[list[int]]:
    """The text in pieces of equal length."""
    ids = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    return [ids[i : i + TOKENS] for i in range(0, len(ids) - TOKENS + 1, TOKENS)]


def dataset(chunks: list[list[int]]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": chunks})


def callback(turns: Turns) -> Any:
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end()

    return Timer()


def picture(curves: dict[str, list[float]], width: int = 640, height: int = 300) -> str:
    """The means of ten steps each as an SVG."""
    smooth = {name: [statistics.mean(y[max(0, i - 9) : i + 1]) for i in range(len(y))] for name, y in curves.items()}
    low, high = min(min(y) for y in smooth.values()), max(max(y) for y in smooth.values())
    left, bottom, top, right = 48, height - 28, 16, width - 12
    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for value in (low, (low + high) / 2, high):
        y = bottom - (bottom - top) * (value - low) / (high - low)
        parts += [
            f'<path d="M{left} {y:.1f}H{right}" stroke="#e5e7eb"/>',
            f'<text x="6" y="{y + 4:.1f}">{value:.2f}</text>',
        ]
    for index, (name, values) in enumerate(smooth.items()):
        x = [left + (right - left) * i / max(len(values) - 1, 1) for i in range(len(values))]
        y = [bottom - (bottom - top) * (value - low) / (high - low) for value in values]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
        color = COLORS[index % len(COLORS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{right - 260}" y="{top + 16 + 18 * index}" fill="{color}">{name}</text>')
    steps = max(len(values) for values in curves.values())
    parts.append(f'<text x="{left}" y="{height - 8}">training loss, mean of ten steps; {steps} steps</text>')
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style}>{"".join(parts)}</svg>\n'


if __name__ == "__main__":
    main()
