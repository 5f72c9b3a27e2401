"""Models that a command is given by folder or name: is it one, can it run here, and loading it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from torch import nn
from transformers import GPTQConfig

from gptq_backend import GPTQError
from gptq_backend.format import embedded_settings, read_json
from gptq_transformers.errors import load_errors
from gptq_transformers.load_quantized import from_quantized
from gptq_transformers.model_class import class_of, from_pretrained, predicts_next_token, read_config
from gptq_transformers.model_files import local_file


def load_model(
    path: str | Path,
    dtype: str | None = None,
    device: str = "cpu",
    backend: str | None = None,
    *,
    head_bits: int | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A language model to evaluate, quantized or not.

    Args:
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto`` (as stored); None is float32 on a CPU, where 16-bit
            matrix products are slow or inexact, and ``auto`` elsewhere.
        backend: row of the kernel table for a quantized model.
        head_bits: to round its output embedding to.

    Raises:
        GPTQError: no such model or device, the model cannot be loaded, or it does not predict the next token.
    """
    require_model(path)
    require_device(device)
    config = read_config(path, trust_remote_code)
    if not predicts_next_token(config, path):
        raise GPTQError(
            f"{path} is a {config.architectures[0]}, which does not predict the next token; perplexity and KL "
            "divergence are defined for causal language models only"
        )
    name = dtype or ("float32" if torch.device(device).type == "cpu" else "auto")
    options: dict[str, Any] = {"dtype": name if name == "auto" else getattr(torch, name)}
    options["trust_remote_code"] = trust_remote_code
    if device != "cpu":
        options["device_map"] = device
    with load_errors(path), warnings.catch_warnings():
        if not is_quantized(path):
            return from_pretrained(class_of(config, path, trust_remote_code), path, **options).eval()
        if backend is not None or head_bits is not None:
            # of which only what is not stored is used
            options["quantization_config"] = GPTQConfig(bits=4, backend=backend, quantize_head=head_bits)
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        return from_quantized(path, **options).eval()


def require_model(path: str | Path) -> None:
    """Raises GPTQError when ``path`` is neither a folder with a model nor the name of one on the hub.

    The hub is asked once, and only for what is not in its cache: ``from_pretrained`` retries for half a minute.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            if (folder / "adapter_config.json").is_file():
                raise GPTQError(
                    f"{path} holds an adapter (adapter_config.json) but no model; merge it into its base model "
                    "(gptq-backend merge; a dense one by peft's merge_and_unload() and save_pretrained), and pass that "
                    "folder"
                )
            if files := sorted(folder.glob("*.gguf")):
                raise GPTQError(_convert_gguf(files[0]))
            raise GPTQError(f"{path} holds no config.json; expected a model folder as save_pretrained writes it")
    elif folder.exists():
        if folder.suffix == ".gguf":
            raise GPTQError(_convert_gguf(folder))
        raise GPTQError(f"{path} is a file; expected the folder that holds the weights, config.json and tokenizer")
    elif folder.is_absolute() or str(path).count("/") > 1 or str(path).startswith((".", "~")):
        raise GPTQError(f"{path} does not exist; expected a model folder")
    elif all(local_file(path, name) is None for name in ("config.json", "adapter_config.json")):
        try:
            HfApi().model_info(str(path), timeout=10)
        except (RepositoryNotFoundError, HFValidationError):
            raise GPTQError(
                f"no folder {path} exists, and the hub has no model of that name (or it is private)"
            ) from None
        except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
            raise GPTQError(f"no folder {path} exists, and the hub could not be reached: {error}") from None


def _convert_gguf(file: Path) -> str:
    """What to do with a model in GGUF's format."""
    return (
        f"{file} is a GGUF file; expected a model folder: make one with gptq-backend convert {file} FOLDER, or to "
        "quantize it, add --to bf16"
    )


def is_quantized(path: str | Path) -> bool:
    """Whether a model's configuration, which must be on this machine, says that it is quantized."""
    if any(local_file(path, name) for name in ("quantize_config.json", "quant_config.json")):
        return True
    config = local_file(path, "config.json")
    return config is not None and bool(embedded_settings(read_json(config)))


def require_device(name: str) -> None:
    """Raises GPTQError when torch cannot compute on the device called ``name`` here."""
    try:
        torch.zeros(1, device=name).item()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise GPTQError(f"device {name!r} cannot be used here; choose one like cpu or cuda:0 ({reason})") from None


def model_limits(model: nn.Module) -> tuple[float, float]:
    """The longest sequence that a model reads, and the number of its tokens; infinite where its config is silent."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None) or -1
    vocabulary = getattr(config, "vocab_size", None)
    return positions if positions > 0 else math.inf, math.inf if vocabulary is None else vocabulary  # -1: any length
