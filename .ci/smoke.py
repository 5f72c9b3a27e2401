"""What every supported combination of versions must do; runs in its environment, and prints the versions as JSON.

    python .ci/smoke.py

A checkpoint of tests/data is loaded without an import of this package, and generates text by the ``cpu`` kernel. Then a
model is quantized, saved, loaded, and saved again.
"""

import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

CHECKPOINT = Path(__file__).resolve().parents[1] / "tests" / "data" / "checkpoints" / "llama-4-32-sym"
PROMPT = torch.tensor([[3, 4, 5]])
REPORTED = ("torch", "transformers", "accelerate", "safetensors", "greenlet", "numpy")


def load_and_generate(folder: Path) -> torch.Tensor:
    """Logits of the prompt, from a folder in whose model each quantized layer must run by the ``cpu`` kernel."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    kernels = {name: str(each.kernel.name) for name, each in model.named_modules() if hasattr(each, "kernel")}
    assert list(kernels.values()) == ["cpu"] * 14, kernels
    assert model.generate(PROMPT, max_new_tokens=8, min_new_tokens=8, do_sample=False).shape == (1, 11)
    with torch.inference_mode():
        return model(PROMPT).logits


def quantize_and_reload(folder: Path) -> None:
    """A model of random weights must give the same logits after it was quantized, saved and loaded, twice."""
    from gptq_backend import QuantizeConfig
    from gptq_transformers import quantize

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "whole")
    samples = torch.randint(256, (16, 32))
    model, _ = quantize(
        str(folder / "whole"), QuantizeConfig(bits=4, group_size=32), samples, output=folder / "quantized"
    )
    with torch.inference_mode():
        expected = model(PROMPT).logits
    reloaded = load_and_generate(folder / "quantized")
    torch.testing.assert_close(reloaded, expected, rtol=0, atol=1e-5)  # whole layers run in another order of sums
    AutoModelForCausalLM.from_pretrained(folder / "quantized").save_pretrained(folder / "again")
    assert torch.equal(load_and_generate(folder / "again"), reloaded)


def main() -> None:
    """The command."""
    load_and_generate(CHECKPOINT)
    with tempfile.TemporaryDirectory() as folder:
        quantize_and_reload(Path(folder))
    build = "CPU" if torch.version.cuda is None else "CUDA, run on the CPU"
    print(
        json.dumps({"python": platform.python_version(), **{name: version(name) for name in REPORTED}, "build": build})
    )


if __name__ == "__main__":
    main()
