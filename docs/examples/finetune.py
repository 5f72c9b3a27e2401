"""Train a LoRA on top of a quantized model with trl, on a CPU, and compare with the same on the 16-bit model.

    pip install "gptq-backend[peft]" trl
    python docs/examples/finetune.py demo-output/smollm2-135m-gptq-4bit-g64 demo-output/smollm2-135m

`make demo` makes these two folders. The text is a play that is packaged with gptq_transformers; its end is held out.
Each model is trained in a process of its own. finetune.json gets all losses, times and the peak of memory, finetune.svg
the losses as a picture.
"""

from __future__ import annotations

import argparse
import json
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
        print(json.dumps(train(options.models[0], options.steps, options.dtype)))
        return
    results = {}
    for folder in options.models:
        settings = ["--steps", str(options.steps), "--dtype", options.dtype]
        command = [sys.executable, __file__, "--one", str(folder), *settings]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[folder.name] = found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{folder.name}: held-out loss {found['before']:.3f} -> {found['after']:.3f}, "
            f"{found['seconds_per_step']:.2f} s per step, peak memory {found['peak_mb']} MB"
        )
    options.json.write_text(json.dumps({"steps": options.steps, "dtype": options.dtype, "models": results}, indent=1))
    options.json.with_suffix(".svg").write_text(picture({name: each["losses"] for name, each in results.items()}))


def train(folder: Path, steps: int, dtype: str) -> dict[str, Any]:
    """The losses of each step, and before and after on text that was held out."""
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
    clock = Clock()
    trainer.add_callback(callback(clock))
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    return {
        "before": before,
        "after": trainer.evaluate()["eval_loss"],
        "losses": losses,
        "seconds_per_step": statistics.median(clock.seconds),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def text_chunks(tokenizer: Any) -> list[list[int]]:
    """The text in pieces of equal length."""
    ids = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    return [ids[i : i + TOKENS] for i in range(0, len(ids) - TOKENS + 1, TOKENS)]


def dataset(chunks: list[list[int]]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": chunks})


class Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.start, self.seconds = 0.0, list[float]()

    def begin(self) -> None:
        self.start = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def callback(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

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
