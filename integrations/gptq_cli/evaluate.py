"""How good is a quantized model: perplexity, and the distance of its predictions to those of a reference model.

Perplexity alone hides differences between methods: it can stay still while the predicted distributions move. The
Kullback-Leibler divergence from the reference sees every such move.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, GPTQConfig
from transformers.utils import cached_file

from gptq_backend import GPTQError
from gptq_backend.format import embedded_settings
from gptq_backend.model import split_windows
from gptq_transformers.errors import loading
from gptq_transformers.load_quantized import from_quantized
from gptq_transformers.model_class import class_of, from_pretrained, predicts_next_token, read_config

# Positions whose distributions are compared at once: with 128k words a chunk stays near 128 MB per model.
_ROWS = 256


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found. KLD is in nats; its figures are None without a reference.

    Args:
        tokens, windows, seqlen: how much text was used.
        perplexity: of the model.
        tokens_per_second: tokens of the windows over the time of the model's own forward passes.
        reference_perplexity: of the reference.
        kld: mean over all positions of KL(reference || model).
        kld_stderr: its standard error over windows (positions of one window are not independent); None for one window.
        kld_p99: 99th percentile over positions.
        top1_agreement: share of positions at which both models find the same token most likely.
    """

    tokens: int
    windows: int
    seqlen: int
    perplexity: float
    tokens_per_second: float
    reference_perplexity: float | None = None
    kld: float | None = None
    kld_stderr: float | None = None
    kld_p99: float | None = None
    top1_agreement: float | None = None


@dataclass
class _Totals:
    """Per window: summed negative log-likelihoods; with a reference also KLD [T] and agreement [T] per position."""

    nll: list[float] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)
    kld: list[Tensor] = field(default_factory=list)
    agree: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0


def cut_windows(text: str, tokenizer: Callable[..., Any], seqlen: int, windows: int) -> Tensor:
    """The first ``windows`` windows of ``seqlen`` tokens of ``text``, fewer if it ends before: int64 [windows, seqlen].

    Each begins with the tokenizer's beginning-of-text token if the whole text does.

    Raises:
        GPTQError: the text is shorter than one window, or the numbers make no sense.
    """
    if seqlen < 2 or windows < 1:
        raise GPTQError(f"seqlen={seqlen} and windows={windows} give nothing to predict; use seqlen >= 2, windows >= 1")
    ids = list(tokenizer(text)["input_ids"])
    found = split_windows(ids, seqlen, tokenizer)[:windows]
    if not found:
        raise GPTQError(
            f"the evaluation text has {len(ids)} tokens, fewer than one window of seqlen={seqlen}; "
            "pass more text or a smaller seqlen"
        )
    return torch.tensor(found, dtype=torch.long)


def evaluate(
    model: nn.Module,
    windows: Tensor | Sequence[Tensor | Sequence[int]],
    reference: nn.Module | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run ``model``, and ``reference`` beside it, over windows of token ids.

    Args:
        model, reference: causal language models as transformers makes them.
        windows: int [W, T], see :func:`cut_windows`.
        on_window: called with how many windows are done and how many there are.

    Raises:
        GPTQError: the two models have different vocabularies, or one of them yields NaN.
    """
    ids = torch.stack([torch.as_tensor(row) for row in windows]).long()
    _check_limits(model, ids)
    if reference is not None:
        _check_limits(reference, ids)
    totals = _Totals()
    with torch.inference_mode():
        for done, window in enumerate(ids, 1):
            start = time.perf_counter()
            logits = _logits(model, window)
            totals.seconds += time.perf_counter() - start
            _add_window(totals, window, logits, None if reference is None else _logits(reference, window))
            if on_window is not None:
                on_window(done, len(ids))
    return _summarize(totals, ids)


def _logits(model: nn.Module, window: Tensor) -> Tensor:
    """window: int [T] -> logits [T, V] on the CPU, in the model's dtype."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=window[None].to(device), use_cache=False).logits[0].cpu()
    return logits


def _add_window(totals: _Totals, window: Tensor, logits: Tensor, reference: Tensor | None) -> None:
    """window: int [T]; logits and reference: [T, V]."""
    if reference is not None and reference.shape != logits.shape:
        raise GPTQError(
            f"the model predicts {logits.shape[-1]} tokens and the reference {reference.shape[-1]}; "
            "a reference must have the same vocabulary"
        )
    nll = reference_nll = 0.0
    kld: list[Tensor] = []
    agree: list[Tensor] = []
    for first in range(0, len(window), _ROWS):
        rows = slice(first, first + _ROWS)
        targets = window[first + 1 : first + 1 + _ROWS, None]
        ours = _log_probabilities(logits[rows], "model")
        nll -= ours[: len(targets)].gather(-1, targets).double().sum().item()
        if reference is None:
            continue
        theirs = _log_probabilities(reference[rows], "reference")
        reference_nll -= theirs[: len(targets)].gather(-1, targets).double().sum().item()
        agree.append(ours.argmax(-1) == theirs.argmax(-1))
        # Tokens that the reference rules out (log 0) add nothing, but would make NaN of 0 * inf.
        difference = torch.where(theirs == -math.inf, 0.0, theirs - ours)
        kld.append(theirs.exp().mul_(difference).sum(-1))
    totals.nll.append(nll)
    if reference is not None:
        totals.reference_nll.append(reference_nll)
        totals.kld.append(torch.cat(kld))
        totals.agree.append(torch.cat(agree))


def _log_probabilities(logits: Tensor, which: str) -> Tensor:
    """[T, V] -> float32 [T, V]."""
    result = logits.float().log_softmax(-1)
    if result.isnan().any():
        raise GPTQError(
            f"the {which}'s logits are NaN; its dtype may overflow (try float32), or its checkpoint is damaged"
        )
    return result


def _summarize(totals: _Totals, ids: Tensor) -> Evaluation:
    windows, seqlen = ids.shape
    predicted = windows * (seqlen - 1)
    result = {
        "tokens": windows * seqlen,
        "windows": windows,
        "seqlen": seqlen,
        "perplexity": math.exp(min(sum(totals.nll) / predicted, 700.0)),
        "tokens_per_second": windows * seqlen / totals.seconds,
    }
    if totals.kld:
        kld = torch.stack(totals.kld).double()
        result.update(
            reference_perplexity=math.exp(min(sum(totals.reference_nll) / predicted, 700.0)),
            kld=kld.mean().item(),
            kld_stderr=(kld.mean(1).std() / windows**0.5).item() if windows > 1 else None,
            kld_p99=_quantile(kld.flatten(), 0.99),
            top1_agreement=torch.stack(totals.agree).double().mean().item(),
        )
    return Evaluation(**result)  # type: ignore[arg-type]


def _quantile(values: Tensor, share: float) -> float:
    """As ``Tensor.quantile``, which refuses more than 16 million values."""
    position = share * (values.numel() - 1)
    ordered = values.sort().values
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return (low + (high - low) * (position - math.floor(position))).item()


def _check_limits(model: nn.Module, ids: Tensor) -> None:
    """Windows that the model cannot read end in an index error deep inside it; say it before."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit, vocabulary = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    if limit is not None and 0 < limit < ids.shape[1]:  # -1: any length
        raise GPTQError(f"windows of {ids.shape[1]} tokens exceed the model's {limit} positions; use a smaller seqlen")
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise GPTQError(
            f"token id {int(ids.max())} is outside the model's vocabulary of {vocabulary}; "
            "tokenize with the model's own tokenizer"
        )


def load_model(
    path: str | Path,
    dtype: str | None = None,
    device: str = "cpu",
    backend: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A language model to evaluate, quantized or not.

    Args:
        path: folder, or name of a model on a hub.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto`` (as stored); None is float32 on a CPU, where 16-bit
            matrix products are slow or inexact, and ``auto`` elsewhere.
        device: where it runs.
        backend: row of the kernel table for a quantized model.
        trust_remote_code: run the Python code that comes with the model; without, such a model is refused.

    Raises:
        GPTQError: no such model or device, the model cannot be loaded, or it does not predict the next token.
    """
    require_model(path)
    require_device(device)
    config = read_config(path, trust_remote_code)
    if not predicts_next_token(config, path):
        raise GPTQError(
            f"{path} is a {config.architectures[0]}, which does not predict the next token; perplexity and KL "
            "divergence are measured of causal language models only"
        )
    name = dtype or ("float32" if torch.device(device).type == "cpu" else "auto")
    options: dict[str, Any] = {"dtype": name if name == "auto" else getattr(torch, name)}
    options["trust_remote_code"] = trust_remote_code
    if device != "cpu":
        options["device_map"] = device
    with loading(path), warnings.catch_warnings():
        if not is_quantized(path, trust_remote_code):
            return from_pretrained(class_of(config, path, trust_remote_code), path, **options).eval()
        if backend is not None:
            options["quantization_config"] = GPTQConfig(bits=4, backend=backend)  # of which only backend is used
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
                    f"{path} holds an adapter (adapter_config.json) and no model; merge it into its base model (peft: "
                    "merge_and_unload(), then save_pretrained), and pass that folder"
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
    elif not any(_is_cached(str(path), name) for name in ("config.json", "adapter_config.json")):
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
    source = f"from_pretrained({str(file.parent)!r}, gguf_file={file.name!r})"
    return (
        f"{file} is a GGUF file; expected a model folder: make one with transformers, calling "
        f"AutoModelForCausalLM.{source}.save_pretrained(FOLDER) and the same with AutoTokenizer"
    )


def _is_cached(model: str, file: str) -> bool:
    try:
        return cached_file(model, file, local_files_only=True) is not None
    except (OSError, ValueError):
        return False


def require_device(name: str) -> None:
    """Raises GPTQError when torch cannot compute on the device called ``name`` here."""
    try:
        torch.zeros(1, device=name).item()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise GPTQError(f"device {name!r} cannot be used here; choose one like cpu or cuda:0 ({reason})") from None


def is_quantized(path: str | Path, trust_remote_code: bool = False) -> bool:
    """Whether a model's configuration says that it is quantized."""
    folder = Path(path)
    if any((folder / name).is_file() for name in ("quantize_config.json", "quant_config.json")):
        return True
    if not folder.is_dir():
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        return getattr(config, "quantization_config", None) is not None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise GPTQError(f"{folder / 'config.json'} is not valid JSON ({error}); fetch the file again") from None
    return bool(embedded_settings(config))
