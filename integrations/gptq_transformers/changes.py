"""Changing a quantized model: ``dequantize()``, and what transformers refuses or fails at: casts, other embeddings."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn

from gptq_backend import ConfigError, QuantLinear, TiedHead
from gptq_backend.model import replace_module

from .dispatch import keeping_hooks
from .experts.expert_list import ExpertList
from .experts.fuse import fuse_experts
from .loading.split_layers import join_layers
from .quantized_layers import dtype_of_parameter, make_dense, quant_linears

logger = logging.getLogger(__name__)

_CASTS = ("half", "float", "to")


def allow_changes(model: nn.Module) -> None:
    """Let ``.half()``, ``.float()``, ``.to(dtype)``, ``resize_token_embeddings`` and ``set_input_embeddings`` work.

    A QuantLinear keeps its stored dtypes and computes in that of its input, so casting the rest is well defined;
    transformers refuses it. It would resize the input embedding and then fail at a quantized output embedding, and a
    new input embedding would leave a head that is tied to the old one, whose weight nobody saves.
    """
    for name in _CASTS:
        method = getattr(nn.Module, name)
        # With a name, which accelerate looks at in a model that is spread over devices.
        setattr(model, name, functools.update_wrapper(functools.partial(method, model), method))
    if hasattr(model, "resize_token_embeddings"):
        setattr(model, "resize_token_embeddings", functools.partial(_resize, model))  # noqa: B010
    if hasattr(model, "set_input_embeddings"):
        setattr(model, "set_input_embeddings", functools.partial(_replace_embedding, model))  # noqa: B010


def forbid_changes(model: nn.Module) -> None:
    """Undo :func:`allow_changes`."""
    for name in (*_CASTS, "resize_token_embeddings", "set_input_embeddings"):
        vars(model).pop(name, None)


def _resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *more: Any, **options: Any
) -> Any:
    """As the model's class does it, after quantized embeddings of another size were dequantized."""
    rows, multiple = model.get_input_embeddings().weight.shape[0], pad_to_multiple_of or 1
    rows = -(-(new_num_tokens or rows) // multiple) * multiple
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(layer, QuantLinear) and layer.weight.shape[0] != rows:
            dequantize_embedding(model, layer, "new tokens need rows in full precision")
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *more, **options)


def _replace_embedding(model: Any, value: nn.Module) -> None:
    """As the model's class does it, after a head that is tied to the old embedding was given its dequantized weight."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, TiedHead) and value is not head.embedding:
        dequantize_embedding(model, head.embedding, "its head does not go with another embedding")
    type(model).set_input_embeddings(model, value)


def dequantize_embedding(model: Any, layer: QuantLinear, reason: str) -> None:
    """Make the input or the output embedding dense, and one that is tied to it, and say why."""
    name = next(name for name, module in model.named_modules() if module is layer)
    settings: Any = getattr(model.config, "quantization_config", None)
    if layer is model.get_output_embeddings() and getattr(settings, "lm_head", None):
        settings.lm_head = False
    with keeping_hooks(model):
        dense = make_dense(model, name, layer, layer.compute_dtype).requires_grad_(False)
    logger.warning(
        "%s is quantized, and %s: it was dequantized (%d MB instead of %d), and will be saved that way",
        name,
        reason,
        dense.weight.nbytes >> 20,
        layer.stored_spec.nbytes >> 20,
    )


def dequantize(model: Any, dtype: torch.dtype | None = None) -> None:
    """Replace the quantized layers of ``model`` by ordinary ones, in place, and forget that it was quantized.

    Layers and experts that the checkpoint has apart become those of transformers again, which finds what is saved.

    Args:
        dtype: what to cast all parameters to that are of the model's dtype, as loading in it would; buffers, and
            parameters that the model keeps in float32, stay. None: the layers get the dtype that dense ones would
            have, and nothing else changes.

    Raises:
        ConfigError: weights are offloaded; nothing was replaced.
    """
    layers = dict(quant_linears(model))
    for name, layer in layers.items():
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise ConfigError(f"{name}: its weights are offloaded; load the model without offloading to dequantize it")
    old = model.dtype
    adapted = getattr(model, "peft_config", None) is not None  # then adapters alone are trained
    let_go(model)
    with keeping_hooks(model):
        for name in [*layers]:
            layer = layers.pop(name)  # each is freed in turn
            own = layer.compute_dtype
            if dtype is not None and own == old:
                own = dtype_of_parameter(model, f"{name}.weight", dtype)  # not by way of the old one
            make_dense(model, name, layer, own).requires_grad_(not adapted)
    if dtype is not None:
        # Others, and buffers such as rotary frequencies, have their dtype on purpose.
        for name, parameter in model.named_parameters():
            if parameter.dtype == old:
                parameter.data = parameter.data.to(dtype_of_parameter(model, name, dtype))
    settle(model)


def let_go(model: nn.Module) -> None:
    """Before quantized layers are replaced: nothing else keeps them and what they hold alive."""
    from .fused import remove_fused  # needs all of transformers' modeling, which may be what imports this

    remove_fused(model)
    for module in model.modules():
        if isinstance(module, ExpertList):
            module.ungroup()


def settle(model: Any) -> None:
    """After quantized layers were replaced by ``nn.Linear``: the classes and names of an ordinary model.

    Without any quantized layer the model forgets that it was quantized.
    """
    new = _new_model(model)
    with keeping_hooks(model):
        for name, module in [*model.named_modules()]:
            wanted = type(new.get(name))
            if type(module) is nn.Linear and wanted.__name__ == "Conv1D":
                replace_module(model, name, _as_conv1d(module, wanted))
        join_layers(model)
        if any(quant_linears(model)):
            return
        fuse_experts(model, new)
    forbid_changes(model)
    vars(model).pop("_weight_conversions", None)  # how it was read; saved is what transformers itself would write
    for holder, key in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
        (model.config, "_pre_quantization_dtype"),
    ):
        vars(holder).pop(key, None)
    model.is_quantized = False


def _new_model(model: Any) -> dict[str, nn.Module]:
    """The modules of the model if it were built anew, without weights: GPT-2's linear layers are Conv1D."""
    with torch.device("meta"):
        return dict(type(model)(model.config).named_modules())


def _as_conv1d(linear: nn.Linear, conv1d: Any) -> nn.Module:
    """The same product as transformers' ``Conv1D``, which stores the weight transposed and always has a bias."""
    with torch.device("meta"):
        conv: nn.Module = conv1d(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().t().contiguous(), linear.weight.requires_grad)
    bias = linear.bias
    conv.bias = nn.Parameter(torch.zeros(linear.out_features).to(conv.weight)) if bias is None else bias
    return conv
