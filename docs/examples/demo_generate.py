"""What a user's program does, and nothing more: load a model folder and generate. Imports torch and transformers only.

    python docs/examples/demo_generate.py FOLDER PROMPT TOKENS

Prints one line of JSON: the text, tokens per second, and by how much loading the model grew the process's memory.
"""

import gc
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def resident_bytes() -> int | None:
    """Memory that the process holds now; None where the system does not tell this way."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    folder, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = resident_bytes()
    # float32: CPUs without 16-bit units are many times slower in bfloat16.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    settings = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    model.generate(**inputs, max_new_tokens=2, **settings)  # not timed: the first call sets things up
    gc.collect()
    after = resident_bytes()
    start = time.perf_counter()
    output = model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, **settings)
    seconds = time.perf_counter() - start
    new = output[0, inputs["input_ids"].shape[1] :]
    result = {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens_per_second": len(new) / seconds,
        "resident_bytes": None if before is None or after is None else after - before,
        "layer": type(model.model.layers[0].mlp.up_proj).__name__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
