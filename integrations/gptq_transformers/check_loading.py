"""Does a checkpoint have every weight that the model needs, in its shape?"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import transformers
from torch import Tensor, nn

from gptq_backend import CheckpointError
from gptq_backend.format import Manifest

from .experts.conversions import produces, remaining_converters
from .quantized_layers import quant_linears, tied_names


def absent(model: nn.Module, manifest: Manifest, dense: Collection[str]) -> list[str]:
    """Parameters of a prepared model that the files do not have under any name.

    What transformers ties, makes of other tensors or drops is not among them.

    Args:
        model: see :func:`prepare_loading.prepare_model`, as are ``manifest`` and ``dense`` of its plan.
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
                f"{key} is not in the checkpoint ({len(missing)} of the model's tensors are not), neither quantized "
                "nor dense, and would be random; fetch all of its files, or check that config.json belongs to them"
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
