"""Turn a GGUF file into an ordinary Hugging Face model folder, with transformers' own GGUF loading.

python docs/examples/demo_convert.py FILE.gguf FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in bfloat16, the precision it was trained in, and its tokenizer."""
    source, name = gguf.parent, gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # The loaded model counts as quantized and refuses to be saved: hand its weights to one that never was.
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    config = type(loaded.config).from_dict(settings)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = {key: tensor.to(torch.bfloat16) for key, tensor in loaded.state_dict().items()}
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
