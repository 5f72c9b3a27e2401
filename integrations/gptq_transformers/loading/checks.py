"""Does a checkpoint have every weight that the model needs, in its shape and with finite values?"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gptq_backend import CheckpointError, ConfigError, QuantLinear
from gptq_backend.format import Manifest, read_tensor

from ..experts.conversions import produces, remaining_converters
from ..quantized_layers import quant_linears, tied_names

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def absent(model: nn.Module, manifest: Manifest, dense: Collection[str]) -> list[str]:
    """Parameters of a prepared model that the files do not have under any name; see :class:`LoadPlan`.

    What transformers ties, makes of other tensors or drops is not among them.
    """
    converters = remaining_converters(model)
    tied = tied_names(model)
    return [
        key
        for key, _ in model.named_parameters()
        if key not in manifest
        and key.removesuffix(".weight") not in dense
        and key not in tied
        and not any(produces(each, key) for each in converters)
    ]


def not_loaded(model: nn.Module) -> list[str]:
    """Parameters that transformers 5 did not find and initialised at random; version 4 tells the quantizer itself."""
    if transformers.__version__.startswith("4."):
        return []
    return [
        key
        for key, parameter in model.named_parameters()
        if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False))
    ]


def check_loaded(model: nn.Module, missing: Iterable[str]) -> None:
    """Refuse random values in the base model and the output embedding; another head is the user's business.

    Raises:
        CheckpointError: with the first missing tensor.
    """
    optional = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or []]
    missing = [key for key in missing if not any(pattern.search(key) for pattern in optional)]
    required = _needed(model)
    for key in missing:
        if key.startswith(required):
            raise CheckpointError(
                f"{key} is not in the checkpoint ({len(missing)} of the model's tensors are missing), neither "
                "quantized nor dense, and would be random; fetch all of its files, or check that config.json fits them"
            )


def _needed(model: Any) -> tuple[str, ...]:
    """Starts of the names of all tensors without which the model would compute nonsense."""
    base = getattr(model, "base_model", model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if base is model:
        return ("",)
    wanted = [name for name, module in model.named_modules() if module is base or module is head]
    return tuple(f"{name}." for name in [*wanted, *(name for name, _ in quant_linears(model))])


def check_dense_shapes(model: nn.Module, manifest: Manifest, parameters: Mapping[str, Tensor]) -> None:
    """Compare before the loader does: transformers 5 compares nothing when the model is quantized.

    Raises:
        CheckpointError: a dense parameter has another shape in the files, or is no floating-point tensor there.
    """
    converters = remaining_converters(model)
    for key, parameter in parameters.items():
        stored = manifest.get(key)
        if stored is None or stored.shape == tuple(parameter.shape):
            continue
        if any(
            converter.rename_source_key(name)[1] is not None for converter in converters for name in (key, stored.key)
        ):
            continue  # its stored shape is not that of the model
        raise CheckpointError(
            f"{key}: the checkpoint has shape {list(stored.shape)}, the model {list(parameter.shape)}; config.json and "
            "the weights belong to different models: fetch both again"
        )
    for key, parameter in parameters.items():
        dtype = manifest[key].dtype if key in manifest else None
        if dtype is not None and parameter.is_floating_point() and not dtype.is_floating_point:
            raise CheckpointError(
                f"{key} is stored as {dtype}, expected a floating-point type like torch.float16; the file is damaged "
                "or was changed: fetch it again"
            )


def check_finite(model: nn.Module, manifest: Manifest) -> None:
    """Refuse parameters that are not finite; the layers that are quantized check theirs.

    Buffers may be: masks hold minus infinity on purpose. Nothing is known of what is offloaded. Costs about a twentieth
    of reading the tensors, and no memory.

    Raises:
        CheckpointError: with the tensor and its file.
        ConfigError: a value of the file is too large for the dtype that the model is loaded in.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, QuantLinear):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if not _is_finite(parameter):
                _refuse(name, parameter, manifest)


def check_stored(names: Iterable[str], manifest: Manifest) -> None:
    """As :func:`check_finite`, for dense parameters that are read from the files one at a time."""
    for name in names:
        if name in manifest and manifest[name].dtype in _DTYPES:
            tensor = read_tensor(manifest[name])
            if not _is_finite(tensor):
                _refuse(name, tensor, manifest)


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or tensor.dtype not in _DTYPES or not tensor.numel():
        return True
    extremes = torch.stack(torch.aminmax(tensor.detach()))  # NaN if any is; isfinite() takes twenty times as long
    return bool(extremes.isfinite().all())


def _refuse(name: str, parameter: Tensor, manifest: Manifest) -> None:
    count = int((~parameter.detach().isfinite()).sum())
    info = manifest.get(name)
    if info is not None and parameter.dtype != info.dtype and _is_finite(read_tensor(info)):
        raise ConfigError(
            f"{name}: {count} of its values are too large for {parameter.dtype} (the checkpoint has {info.dtype}); "
            "load the model with dtype=torch.bfloat16 or torch.float32"
        )
    where = "" if info is None else f" in {info.file.path.name}"
    raise CheckpointError(f"{name}: {count} values{where} are NaN or infinite; the file is damaged, fetch it again")
