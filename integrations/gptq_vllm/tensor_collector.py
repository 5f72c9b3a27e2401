"""Parameters that receive a checkpoint's tensors from vLLM's weight loaders, one stored layer at a time.

The shards of a fused layer may differ in bits, groups and act-order, and packed words need not divide between ranks,
so nothing is copied into one big tensor on arrival. The parameters are empty; their loaders collect a stored layer
and, once it is complete, cut out what this rank needs of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs

from gptq_backend import CheckpointError
from gptq_backend.format import read_packed

from .checkpoint import PARTS, Use
from .pieces import AnyPiece, DensePiece

if TYPE_CHECKING:
    from .config import GPTQBackendConfig

_DTYPES = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32}


class Arrivals:
    """Stored layers, by vLLM's names, of which some tensors have come."""

    def __init__(self, config: GPTQBackendConfig, uses: dict[str, Use]) -> None:
        self._config = config
        self._uses: dict[str, Use] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        for name, use in uses.items():
            self.use(name, use)

    def use(self, name: str, use: Use) -> None:
        """Also accept layer ``name``."""
        if name not in self._uses:
            self._uses[name] = use
            self._config.expect(name, use)

    def add(self, name: str, part: str, tensor: Tensor) -> AnyPiece | None:
        """Take one tensor of layer ``name``; the whole layer if it was the last one."""
        tensors = self._tensors.setdefault(name, {})
        tensors[part] = tensor.cpu()  # some loaders read straight to a GPU; the cutting is done here
        wanted = self._config.stored_parts(name)
        return self._complete(name) if wanted and wanted <= tensors.keys() else None

    def rest(self) -> Iterable[tuple[str, AnyPiece]]:
        """Layers of which nothing more can come: those whose name the checkpoint has otherwise."""
        for name in list(self._tensors):
            yield name, self._complete(name)

    def _complete(self, name: str) -> AnyPiece:
        tensors = self._tensors.pop(name)
        use = self._uses[name]
        if "qweight" not in tensors and "weight" in tensors:
            _check_dense(name, tensors["weight"], use)
            return DensePiece(tensors["weight"])
        spec, bias = self._config.spec(name, use, tensors)
        if bias is not None:
            tensors["bias"] = bias
        return read_packed(spec, tensors, name)


def add_parameters(
    layer: nn.Module,
    receive: Callable[..., Any],
    infos: dict[str, torch.dtype | None],
    rename: str = "{}",
    dense: bool = True,
) -> None:
    """Give ``layer`` an empty parameter per part of a stored layer.

    Args:
        layer: of the model.
        receive: called as ``receive(part, parameter, tensor, ...)`` with what vLLM's loaders pass on.
        infos: dtypes in the file by part, where known; vLLM warns about others.
        rename: name of a part's parameter.
        dense: whether there also is one for an unquantized ``weight``.
    """
    for part in (*PARTS, "weight") if dense else PARTS:
        dtype = infos.get(part) or _DTYPES.get(part, torch.get_default_dtype())
        parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

        def load(param: nn.Parameter, loaded_weight: Tensor, *args: Any, _part: str = part, **kwargs: Any) -> Any:
            return receive(_part, loaded_weight, *args, **kwargs)

        set_weight_attrs(parameter, {"weight_loader": load})
        if part != "g_idx":  # for models that sort the output channels of their file before they call the loader
            set_weight_attrs(parameter, {"output_dim": 0 if part == "weight" else 1})
        layer.register_parameter(rename.format(part), parameter)


def remove_parameters(layer: nn.Module, rename: str = "{}") -> None:
    """Undo :func:`add_parameters`."""
    for part in (*PARTS, "weight"):
        layer._parameters.pop(rename.format(part), None)


def output_rows(layer: nn.Module, loader: Callable[..., Any], stored: int, total: int, *shard: Any) -> Tensor:
    """Which output channel of a stored layer goes where on this rank, as vLLM's own loader of a weight decides.

    The loader copies numbers instead of rows, so that every kind of layer, replicated heads and padded vocabularies
    included, is cut the way it cuts itself.

    Args:
        layer: of the model.
        loader: its weight loader.
        stored: output channels of the stored layer.
        total: output channels of the layer on this rank.
        shard: shard id, where the loader takes one.

    Returns:
        int64 [total]: one more than the stored channel; 0 where nothing of this shard goes.
    """
    rows = _numbers(layer, (total, 1), loader)
    loader(rows, torch.arange(1, stored + 1)[:, None], *shard)
    return rows.data[:, 0]


def input_columns(layer: nn.Module, loader: Callable[..., Any], stored: int, total: int) -> tuple[int, int]:
    """First input channel on this rank, and how many: see :func:`output_rows`."""
    columns = _numbers(layer, (1, total), loader)
    loader(columns, torch.arange(stored)[None])
    return int(columns.data[0, 0]), total


def _numbers(layer: nn.Module, shape: tuple[int, int], loader: Callable[..., Any]) -> ModelWeightParameter:
    numbers = ModelWeightParameter(
        data=torch.zeros(shape, dtype=torch.int64, device="cpu"), input_dim=1, output_dim=0, weight_loader=loader
    )
    numbers.tp_rank, numbers.tp_size = layer.tp_rank, layer.tp_size  # type: ignore[assignment]
    return numbers


def _check_dense(name: str, weight: Tensor, use: Use) -> None:
    expected = (use.out_features or weight.shape[0], use.in_features)
    if tuple(weight.shape) != expected:
        raise CheckpointError(
            f"{name}.weight has shape {list(weight.shape)}, the model expects {list(expected)}; config.json and the "
            "weights belong to different models"
        )


def missing(name: str) -> CheckpointError:
    """The error for a layer that the loader brought nothing for."""
    return CheckpointError(
        f"{name} is not in the checkpoint, neither quantized nor dense, and would be random; fetch all of its files, "
        "or check that config.json belongs to them"
    )
