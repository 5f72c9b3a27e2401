"""Receives a checkpoint's tensors from vLLM's weight loaders, one stored layer at a time.

The shards of a fused layer may differ in bits, groups and act-order, and packed words need not divide between ranks,
so nothing is copied into one big tensor on arrival. The layer's parameters are empty; their loaders collect a stored
layer and, once it is complete, cut out what this rank needs of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend import CheckpointError
from gptq_backend.format import STORED_PARTS, read_packed

from .compat import ModelWeightParameter, set_weight_attrs, weigh
from .pieces import AnyPiece, DensePiece
from .reloads import await_again
from .stored_layers import ExpectedLayer, StoredLayers

_PARTS = (*STORED_PARTS, "weight")
_WEIGHED = 1 << 20  # elements that vLLM takes each empty parameter for; more than tensors ever come for a layer
_DTYPES = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32}


class TensorCollector:
    """Collects the stored layers of one layer of the model, when it is loaded and whenever it is loaded again.

    A reload of vLLM hands every tensor to the loader twice: to count what would be loaded, with the parameter on the
    meta device, and once enough has come for the layer, with the parameter in place. Here the first counts: what came
    is kept, and the whole is counted as loaded with the tensor that completes it. After a reload that was aborted, vLLM
    still counts what came in it, so that the next one is left to end with all of the model.

    Args:
        layers: by vLLM's names, those that may come.
        place: called as ``place(name, weight)`` with each stored layer when it is complete.
        begin: called before the first tensor of a reload.
        sets: how many sets of empty parameters the layer has.
    """

    def __init__(
        self,
        stored: StoredLayers,
        layers: dict[str, ExpectedLayer],
        place: Callable[[str, AnyPiece], None],
        begin: Callable[[], None],
        sets: int = 1,
    ) -> None:
        self._stored, self._place, self._begin = stored, place, begin
        self._whole = sets * len(_PARTS) * _WEIGHED  # what vLLM waits for
        self._layers: dict[str, ExpectedLayer] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}  # by part, of the stored layers that are incomplete
        self._known: set[str] = set()  # stored layers that the checkpoint has under these names,
        self._waiting: set[str] = set()  # and those of them that are incomplete
        self._counted, self._reload = 0, 0
        self._reloading = self._after_aborted = False
        self._last: Tensor | None = None  # the parameter with which a reload of this layer ended
        for name, layer in layers.items():
            self.expect(name, layer)

    def expect(self, name: str, layer: ExpectedLayer) -> None:
        """Also accept layer ``name``."""
        if name not in self._layers:
            self._layers[name] = layer
            self._stored.expect(name, layer)
            if self._stored.checkpoint.parts(name):
                self._waiting.add(name)
                self._known.add(name)

    def receive(self, param: Tensor, name: str, part: str, tensor: Tensor) -> None:
        """Take one tensor of layer ``name``. param: the one that it was loaded into."""
        if self._reloading and not param.is_meta:
            return  # it was kept when it was counted
        try:
            if param.is_meta:
                self._follow_reload()
            self._take(name, part, tensor)
        except Exception:
            self._stored.reloads.failed()
            raise
        if self._reloading:
            if name in self._known and not self._waiting and not self._after_aborted:
                self._last = param
                _count(param, self._whole - self._counted)
            else:
                _count(param, 1)
            self._counted += 1

    def _take(self, name: str, part: str, tensor: Tensor) -> None:
        tensors = self._tensors.setdefault(name, {})
        tensors[part] = tensor.cpu()  # some loaders read straight to a GPU; the cutting is done here
        parts = self._stored.checkpoint.parts(name).keys()
        if parts and parts <= tensors.keys():
            self._complete(name)

    @contextmanager
    def finished(self, layer: nn.Module) -> Iterator[None]:
        """Nothing more will come, and in this context ``layer`` is made of all that was placed.

        If that fails in a reload, the next one brings all of the layer again.
        """
        reloading, self._reloading = self._reloading, False
        try:
            for name in list(self._tensors):  # the layers that the checkpoint has under another name
                self._complete(name)
            yield
        except Exception:
            self._stored.reloads.failed()
            if reloading:
                await_again(layer)
            raise
        self._stored.reloads.loaded(layer)

    def _follow_reload(self) -> None:
        """Forget what came before, if a reload has begun since."""
        number = self._stored.current_reload()
        if self._reloading and number == self._reload:
            return
        self._after_aborted = self._reloading
        self._reloading, self._reload, self._counted = True, number, 0
        if self._last is not None:  # vLLM has the same parameter again, with the weight that ended that reload
            weigh(self._last, _WEIGHED)
        self._begin()
        self._tensors.clear()
        self._known = {name for name in self._layers if self._stored.checkpoint.parts(name)}
        self._waiting = set(self._known)

    def _complete(self, name: str) -> None:
        tensors, layer = self._tensors.pop(name), self._layers[name]
        self._waiting.discard(name)
        tensors = self._stored.translated(name, tensors)
        if "qweight" not in tensors and "weight" in tensors:
            _check_dense(name, tensors["weight"], layer)
            self._place(name, DensePiece(tensors["weight"], self._stored.unknown_bias(name, layer)))
            return
        if lacking := [part for part in ("qweight", "qzeros", "scales") if part not in tensors]:
            raise CheckpointError(
                f"{name}: of its tensors came {', '.join(tensors)}, but not {', '.join(lacking)}; load all tensors of "
                "a layer together"
            )
        spec, bias = self._stored.spec(name, layer, tensors)
        if bias is not None:
            tensors["bias"] = bias
        self._place(name, read_packed(spec, tensors, name))


def add_parameters(
    layer: nn.Module,
    load: Callable[..., Any],
    dtypes: Mapping[str, torch.dtype | None],
    name: Callable[[str], str] = str,
) -> None:
    """Give ``layer`` an empty parameter per part of a stored layer.

    Args:
        load: called as ``load(part, param, tensor, ...)`` with what vLLM's loaders pass on.
        dtypes: in the file by part, where known; vLLM warns about others.
        name: of a part's parameter, by the part.
    """
    for part in _PARTS:
        dtype = dtypes.get(part) or _DTYPES.get(part, torch.get_default_dtype())
        parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

        # A function, since vLLM reads the __name__ of a loader.
        def weight_loader(param: nn.Parameter, loaded_weight: Tensor, *args: Any, _part: str = part, **kw: Any) -> Any:
            return load(_part, param, loaded_weight, *args, **kw)

        set_weight_attrs(parameter, {"weight_loader": weight_loader})
        weigh(parameter, _WEIGHED)
        if part != "g_idx":  # for models that sort the output channels of their file before they call the loader
            set_weight_attrs(parameter, {"output_dim": 0 if part == "weight" else 1})
        layer.register_parameter(name(part), parameter)


def remove_parameters(layer: nn.Module, name: Callable[[str], str] = str) -> None:
    """Undo :func:`add_parameters`. An empty ``qweight`` stays, by which LoRA finds the layer's device."""
    for called in map(name, _PARTS):
        parameter = layer._parameters.pop(called, None)
        if called == "qweight" and parameter is not None:
            empty = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            layer.register_parameter(called, nn.Parameter(empty, requires_grad=False))


def _count(param: Tensor, elements: int) -> None:
    """Let vLLM count so many elements as loaded into a parameter on the meta device."""
    weigh(param, max(elements, _WEIGHED))  # of which it counts no more
    torch.empty(elements, device="meta").copy_(torch.empty(elements, device="meta"))


def output_rows(layer: Any, loader: Callable[..., Any], stored: int, total: int, *shard: Any) -> Tensor:
    """Which output channel of a stored layer goes where on this rank, as vLLM's own loader of a weight decides.

    The loader copies numbers instead of rows, so that every kind of layer, replicated heads and padded vocabularies
    included, is cut the way it cuts itself.

    Args:
        stored: output channels of the stored layer.
        total: output channels of the layer on this rank.

    Returns:
        int64 [total]: one more than the stored channel; 0 where nothing of this shard goes.
    """
    rows = _numbers(layer, (total, 1), loader)
    loader(rows, torch.arange(1, stored + 1)[:, None], *shard)
    return rows.data[:, 0]


def first_input(layer: Any, loader: Callable[..., Any], stored: int, total: int) -> int:
    """The stored input channel that is this rank's first: see :func:`output_rows`."""
    columns = _numbers(layer, (1, total), loader)
    loader(columns, torch.arange(stored)[None])
    return int(columns.data[0, 0])


def _numbers(layer: Any, shape: tuple[int, int], loader: Callable[..., Any]) -> Any:
    zeros = torch.zeros(shape, dtype=torch.int64, device="cpu")
    numbers = ModelWeightParameter(data=zeros, input_dim=1, output_dim=0, weight_loader=loader)
    numbers.tp_rank, numbers.tp_size = layer.tp_rank, layer.tp_size
    return numbers


def _check_dense(name: str, weight: Tensor, layer: ExpectedLayer) -> None:
    expected = (layer.out_features or weight.shape[0], layer.in_features)
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
