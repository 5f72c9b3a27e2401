"""The conversions by which transformers 5 turns a checkpoint's names and tensors into the model's, and back.

transformers >= 5 keeps a layer's experts in ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I] and fuses the
checkpoint's ``experts.{i}.gate_proj.weight`` into them while loading. Layers that are quantized one by one must not be
fused, and must be saved under the names that loading found. So the fusing is dropped, and renamings stay: loading
leaves those that matched something in ``model._weight_conversions``, and ``save_pretrained`` applies their inverse:
``.mlp.`` becomes ``.block_sparse_moe.`` again. For a model that is quantized in memory, :func:`keep_packed_names` drops
the fusing there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from gptq_backend import QuantLinear

from ..foreign_linear import ForeignLinear
from .expert_list import ExpertList
from .parallel import ParallelLinears


def model_conversions(model: nn.Module, **kwargs: Any) -> list[Any]:
    """How transformers turns the names and tensors of ``model``'s checkpoints into its own; [] before version 5."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    return list(get_model_conversion_mapping(model, **kwargs))


def converters(model: nn.Module) -> list[Any]:
    """The conversions of transformers for ``model``'s checkpoints that are no mere renamings; [] before version 5."""
    return [conversion for conversion in model_conversions(model) if hasattr(conversion, "operations")]


def remaining_converters(model: nn.Module) -> list[Any]:
    """Those of :func:`converters` that transformers will apply while it loads ``model``."""
    return drop_fused_conversions(converters(model), model)


def drop_fused_conversions(
    weight_conversions: Sequence[Any], model: nn.Module, packed: Iterable[str] = ()
) -> list[Any]:
    """``weight_conversions`` of transformers without those for a parameter that ``model`` no longer has: of fused
    experts, and of quantized layers, whose packed words cannot be cut and joined like the rows of a weight. Those of
    layers that are still to be quantized are ``packed``.

    Renamings stay, since the checkpoint's module names still differ from the model's. See the module's docstring for
    how this makes ``save_pretrained`` write the checkpoint's names.
    """
    gone = [*packed]
    for name, module in model.named_modules():
        if isinstance(module, ExpertList | ParallelLinears):
            gone += [f"{name}.{parameter}" for parameter in module.fused_names]
        elif isinstance(module, QuantLinear | ForeignLinear):
            gone += [f"{name}.weight", f"{name}.bias"]
    return [
        conversion
        for conversion in weight_conversions
        if not (hasattr(conversion, "operations") and any(produces(conversion, parameter) for parameter in gone))
    ]


def keep_packed_names(model: Any, packed: Iterable[str] = ()) -> None:
    """Let ``save_pretrained`` write the layers of a model that was quantized in memory by themselves, where it would
    join the model's q_proj, k_proj and v_proj into the one tensor of the original checkpoint.

    ``packed`` as for :func:`drop_fused_conversions`.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # not loaded from files: save_pretrained takes the default, but no changes of prefix
        conversions = model_conversions(model, add_legacy=False)
        conversions = [each for each in conversions if type(each).__name__ != "PrefixChange"]
    kept = drop_fused_conversions(conversions, model, packed)
    if len(kept) < len(conversions):
        model._weight_conversions = kept


def are_only_renamed(model: Any) -> bool:
    """Whether ``save_pretrained`` writes all tensors as they are, although it may give them other names; with
    transformers 4 also not that.
    """
    if getattr(model, "_checkpoint_conversion_mapping", None) and not hasattr(model, "_weight_conversions"):
        return False
    return not any(hasattr(each, "operations") for each in getattr(model, "_weight_conversions", None) or ())


def stored_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """What ``save_pretrained`` calls the tensors of a model for which :func:`are_only_renamed`."""
    names = list(names)
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return dict(zip(names, names))
    sized = {name: torch.empty(size, device="meta") for size, name in enumerate(names)}  # to be told apart by that
    return {names[len(tensor)]: stored for stored, tensor in revert_weight_conversion(model, sized).items()}


def produces(conversion: Any, parameter: str) -> bool:
    """Whether one of the conversion's targets is the model parameter of that full name."""
    targets = (pattern.replace("\\", "").strip("^$") for pattern in conversion.target_patterns)
    return any(f"{target}." in f"{parameter}." for target in targets)  # some leave out the last .weight
