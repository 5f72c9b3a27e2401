"""The one quantized layer. Its parameters are the checkpoint's tensors until ``prepare`` hands them to a kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, ConfigError
from .format.stored_tensors import StoredSpec, empty_tensors, encode, read_packed, read_quantized, stored_words
from .format.weight import QuantizedWeight, WeightSpec
from .kernels.interface import Kernel, PreparedWeight, Tensors
from .kernels.table import select_kernel
from .lazy_weight import LazyWeight
from .module_moves import changing_layout, check_shardable, check_whole, effect, has_shards, is_sharded, offloading_hook
from .served import Served
from .timing import timed

# What a prepared layer keeps of the checkpoint beside the kernel's tensors: small, and the way back is exact.
_KEPT = {"qzeros": "stored_qzeros", "g_idx": "stored_g_idx"}


class QuantLinear(nn.Module):
    """``y = x @ W.T + bias`` with W quantized.

    Life: empty checkpoint parameters -> a loader fills them -> :meth:`prepare` checks the values, chooses a kernel
    and lets it repack -> forward. Repacking is undone bit for bit wherever someone looks: ``state_dict()``,
    ``deepcopy`` and pickling always see the checkpoint's tensors, and ``.to(device)`` prepares again for the new
    device. Casting the model (``.half()``, ``.to(dtype)``) leaves the layer's stored dtypes alone: outputs follow the
    dtype of x. Threads may call the layer while another moves, casts, saves or reloads it.

    Args:
        spec: shapes, dtypes and format of the stored tensors.
        name: the layer's name in the model, for messages.
        backend: row of the kernel table, or None for the fastest that fits.
        device: where to create the empty parameters.
        dtype: see ``compute_dtype``.

    Attributes:
        compute_dtype: what the weight of a dense layer in its place would have: the dtype of ``weight``, and what
            adapters trained on top (PEFT) should use. By default that of the scales; casts of the model change it.
    """

    bias: nn.Parameter | None
    _served: Served

    def __init__(
        self,
        spec: StoredSpec,
        name: str = "linear",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.stored_spec = spec
        self.name, self.backend = name, backend
        self.compute_dtype = dtype or spec.scales_dtype
        self._expert = False
        self.changes = 0  # of parameters, by assignment
        self.in_features, self.out_features = spec.in_features, spec.out_features
        tensors = empty_tensors(spec, device)
        bias = tensors.pop("bias", None)
        self._hold(tensors, None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    @timed("pack")
    def from_weight(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        checkpoint_format: str = "gptq",
        word_dtype: torch.dtype = torch.int32,
        name: str = "linear",
        backend: str | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantLinear:
        """A prepared layer that holds ``weight``; bias: [N] or None, kept in its dtype; dtype: see ``compute_dtype``.

        With a ``device`` other than that of the weight, codes are packed before they move, and it is prepared when it
        is first used there.
        """
        spec, tensors = encode(weight, checkpoint_format, word_dtype)
        if bias is not None:
            spec = dataclasses.replace(spec, has_bias=True, bias_dtype=bias.dtype)
            bias = nn.Parameter(bias.detach().to(device or bias.device), requires_grad=False)
        layer = cls(spec, name, backend, device="meta", dtype=dtype)
        if device is None or device == weight.codes.device:
            layer._hold(tensors, bias)
            return layer.prepare()
        layer._hold({key: tensor.to(device) for key, tensor in tensors.items()}, bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x: float [..., K] -> [..., N] in the dtype of x."""
        served = self._served
        weight = served.weight
        if weight is None:
            return self._forward_unprepared(x)
        if torch.compiler.is_compiling():
            named: Any = self._parameters
            return weight.multiply_in_graph(named, x, named["bias"])
        return weight.multiply(x, served.parameters["bias"])

    # torch.compiler.disable would import torch._dynamo, which takes as long as torch itself, with this module.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _forward_unprepared(self, x: Tensor) -> Tensor:
        """First call, or a layer whose weights an accelerate hook brings for this call only."""
        if offloading_hook(self) is None:
            return self.prepare()(x)
        return self._prepared_for_call(x.device).multiply(x, self.bias)

    def _prepared_for_call(self, device: torch.device) -> PreparedWeight:
        weight = read_packed(self.stored_spec, self._stored(), self.name)
        return PreparedWeight.of(weight, select_kernel(weight.spec, device, self.backend))

    @changing_layout()
    def prepare(self, expert: bool | None = None) -> QuantLinear:
        """Check the loaded values, choose a kernel for the device that they are on, and repack. Idempotent; threads may
        call it, or the layer, at the same time.

        Args:
            expert: see ``select_kernel``; None leaves what was said before.

        Raises:
            CheckpointError: damaged values (see :func:`stored.resolve`), or parameters that were never loaded.
            ConfigError: the requested backend does not exist or cannot serve the layer.
        """
        if expert is not None and expert != self._expert:
            self._expert = expert
            if self.kernel is not None and self.kernel is not self._select(self.spec):
                self.unprepare()
        if self.kernel is not None:
            return self
        stored, bias = self._stored(), self.bias
        if any(tensor.is_meta for tensor in stored.values()):
            raise CheckpointError(f"{self.name}: its weights were never loaded; load a state dict first")
        weight = read_packed(self.stored_spec, stored if bias is None else {**stored, "bias": bias.data}, self.name)
        prepared = PreparedWeight.of(weight, self._select(weight.spec))
        kept = {new: stored[old] for old, new in _KEPT.items() if old in stored}
        self._hold({**prepared.tensors, **kept}, bias, prepared)
        return self

    def _select(self, spec: WeightSpec) -> Kernel:
        return select_kernel(spec, self._device, self.backend, self._expert)

    @changing_layout()
    def unprepare(self) -> QuantLinear:
        """Return to the checkpoint's tensors, bit for bit."""
        if self.kernel is not None:
            self._hold(self._stored(), self.bias)
        return self

    @property
    def prepared(self) -> PreparedWeight | None:
        """The weight as the kernel has it, among other parameters; None before :meth:`prepare`."""
        return self._served.weight

    @property
    def kernel(self) -> Kernel | None:
        """The row of the kernel table that serves it; None before :meth:`prepare`."""
        weight = self._served.weight
        return None if weight is None else weight.kernel

    @property
    def spec(self) -> WeightSpec:
        """Of the weight in memory: what the checkpoint claims, and after :meth:`prepare` what its values tell."""
        weight = self._served.weight
        return self.stored_spec.weight if weight is None else weight.spec

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [N, K] in ``compute_dtype``, for code that reads it in place of calling the layer.

        Its shape, dtype and device cost nothing, its values a dense layer, made by the first operation that needs them
        (see :class:`LazyWeight`). It is no parameter: it has no gradient and is not saved. Assigning it, or tying
        another weight to it, is a ConfigError.
        """
        if torch.compiler.is_compiling():
            return self._traced_weight()
        shape = (self.out_features, self.in_features)
        make = functools.partial(self._dense_weight, self.compute_dtype)
        return LazyWeight(self.name, shape, self.compute_dtype, self._device, make, self._scale_weight)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of ``nn.Module``; whoever made something of the parameters sees by ``changes`` that it is outdated."""
        if self.kernel is None and param is not None:
            check_shardable(self.name, param)
        self.changes += 1
        super().register_parameter(name, param)

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Take equal tensors in the place of prepared ones, for example slices of a stack of several layers'."""
        for key, tensor in tensors.items():
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=False))

    def quantized_weight(self) -> QuantizedWeight:
        """The layer's codes, scales, zeros and groups."""
        return read_quantized(self.stored_spec, self._stored(), self.name)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An ordinary ``nn.Linear`` with the same weight, rounded once to ``dtype``."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.quantized_weight().dequantize(torch.float32).to(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype))
        return linear

    def extra_repr(self) -> str:
        weight = self._served.weight  # once: another thread may be taking it away
        described = f"{self.stored_spec.describe()}, kernel=not prepared" if weight is None else weight.describe()
        return f"{described}, bias={self.stored_spec.has_bias}"

    # -- storage ---------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        """Where the layer computes."""
        if (hook := offloading_hook(self)) is not None and hook.execution_device is not None:
            return torch.device(hook.execution_device)
        return self._served.parameters["qweight"].device

    def _stored(self) -> Tensors:
        """The checkpoint's tensors, bias excluded."""
        return _stored(self.stored_spec, self._served)

    def _hold(
        self, tensors: Mapping[str, Tensor], bias: nn.Parameter | None, prepared: PreparedWeight | None = None
    ) -> None:
        """Make ``tensors``, the checkpoint's or ``prepared``'s, and ``bias`` the parameters, all at once."""
        parameters: dict[str, Any] = {"bias": bias}
        parameters |= {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in tensors.items()}
        self.changes += 1
        self._parameters = parameters
        self._served = Served(None if prepared is None else prepared._replace(tensors=parameters), parameters)

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        """[N, K], rounded once to ``dtype``."""
        hook = offloading_hook(self)
        with torch.inference_mode(False), torch.no_grad():
            if hook is not None:
                hook.pre_forward(self)
            try:
                weight = self._served.weight
                if weight is None:
                    return self.quantized_weight().dequantize(torch.promote_types(dtype, torch.float32)).to(dtype)
                return weight.dequantize(dtype)
            finally:
                if hook is not None:
                    hook.post_forward(self, None)

    @changing_layout()
    def _scale_weight(self, factor: float) -> None:
        """Multiply the weight by a number that leaves the scales as exact as they are, such as a power of two."""
        if factor == 1:
            return
        prepared, stored = self.kernel is not None, self._stored()
        scales = (stored["scales"].double() * factor).to(stored["scales"].dtype)
        if not torch.equal(scales.double() / factor, stored["scales"].double()):
            raise ConfigError(
                f"{self.name}.weight cannot be multiplied by {factor}: its scales are {scales.dtype}, which does not "
                "hold the products exactly; replace the layer by its dequantize(), which is an nn.Linear"
            )
        self._hold(stored | {"scales": scales}, self.bias)
        if prepared:
            self.prepare()

    def _traced_weight(self) -> Tensor:
        """The same as a part of the graph that is being made, where it vanishes if only its dtype is looked at."""
        weight, dtype = self._served.weight, self.compute_dtype
        if weight is None:
            return self._dense_weight_outside_of_graphs(dtype)
        return weight.dequantize(dtype, self._parameters)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _dense_weight_outside_of_graphs(self, dtype: torch.dtype) -> Tensor:
        return self._dense_weight(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        with changing_layout():
            served = self._served  # once: another thread may be taking it away
            weight, tensors = served.weight, _without_bias(served.parameters)
            home = tensors["qweight"].device
            device, keeps_values, shares = (home, True, False) if weight is None else effect(fn, home)
            if shares:
                self._share(fn)
                return self
            rest, bias = nn.Module(), self.bias  # what is like that of any other module
            rest._parameters, rest._buffers, rest._modules = {"bias": bias}, self._buffers, self._modules
            if bias is not None and not bias.requires_grad:  # torch writes it in place, while a call may be reading it
                old_bias = bias.data
                new_bias = move(old_bias)
                bias = bias if new_bias is old_bias else nn.Parameter(new_bias, requires_grad=False)
                rest._parameters = {}
            bias = nn.Module._apply(rest, move, recurse)._parameters.get("bias", bias)
            cast = fn(torch.empty(0, dtype=self.compute_dtype, device=home)).dtype
            if cast.is_floating_point:
                self.compute_dtype = cast
            if weight is not None and not keeps_values:
                weight, tensors = None, _without_bias(empty_tensors(self.stored_spec, "meta"))
            if weight is None:
                self._hold({key: move(tensor) for key, tensor in tensors.items()}, bias)
            elif device != home:
                self._hold({key: move(tensor) for key, tensor in self._stored().items()}, bias)
                self.prepare()
            else:
                moved = {key: move(tensor) for key, tensor in tensors.items()}
                if bias is not self.bias or any(moved[key] is not tensor for key, tensor in tensors.items()):
                    self._hold(moved, bias, weight)
        return self

    def _share(self, share: Callable[[Tensor], Tensor]) -> None:
        """Put copies into shared memory: in place, it would be pulled from under a kernel that is reading it."""
        served, bias = self._served, self.bias
        if bias is not None and not bias.is_shared():
            shared = nn.Parameter(share(bias.detach().clone()), bias.requires_grad)
            shared.grad, bias = bias.grad, shared
        tensors = _without_bias(served.parameters)
        if bias is not self.bias or not all(tensor.is_shared() for tensor in tensors.values()):
            copies = {k: tensor if tensor.is_shared() else share(tensor.clone()) for k, tensor in tensors.items()}
            self._hold(copies, bias, served.weight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ConfigError(
                f"{self.name}.weight is quantized and cannot be assigned or tied to another; replace the layer by its "
                "dequantize(), which is an nn.Linear, and assign the weight of that"
            )
        super().__setattr__(name, value)
        if name == "_hf_hook" and self.kernel is not None and offloading_hook(self) is not None:
            self._follow_offload(value)

    def _follow_offload(self, hook: Any) -> None:
        """accelerate has put a prepared layer on the meta device; what it will bring for each call is the
        ``state_dict()``, hence be a layer of those tensors.
        """
        empty = empty_tensors(self.stored_spec, self._served.parameters["qweight"].device)
        self._hold(_without_bias(empty), self.bias)
        for item in getattr(hook, "hooks", [hook]):
            if getattr(item, "original_devices", None):
                home = item.original_devices["qweight"]
                item.original_devices = {key: home for key, value in self._parameters.items() if value is not None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if is_sharded(self._served.parameters["qweight"]):  # by FSDP, which looks for the parameters that it cut
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        destination.update({prefix + key: tensor for key, tensor in self._stored().items()})
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    @changing_layout()
    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        concerned = any(key.startswith(prefix) and "." not in key[len(prefix) :] for key in state_dict)
        if concerned or self._load_state_dict_pre_hooks:
            if not has_shards(self._parameters, state_dict, prefix):
                self.unprepare()
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        _, strict, missing_keys, *_ = rest
        if strict:  # as above, for a state dict, an adapter's for example, that has nothing of this layer
            missing_keys += [f"{prefix}{key}" for key in self.stored_spec.shapes]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        served = state.pop("_served")
        stored = {key: nn.Parameter(t, requires_grad=False) for key, t in _stored(self.stored_spec, served).items()}
        parameters = {"bias": served.parameters["bias"], **stored}
        return state | {"_parameters": parameters, "_was_prepared": served.weight is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        prepared = state.pop("_was_prepared")
        super().__setstate__(state)
        self._served = Served(None, self._parameters)
        if prepared:  # by a kernel of the machine that reads the copy
            self.prepare()


def _stored(spec: StoredSpec, served: Served) -> Tensors:
    """The checkpoint's tensors, bit for bit, bias excluded."""
    check_whole(served.parameters["qweight"])
    held, weight = _without_bias(served.parameters), served.weight
    if weight is None:
        return held
    qweight, scales, _ = weight.kernel.unprepare(weight.spec, held)
    kept = {old: held[new] for old, new in _KEPT.items() if new in held}
    return {"qweight": stored_words(spec, qweight), "qzeros": kept.pop("qzeros"), "scales": scales, **kept}


def _without_bias(parameters: Mapping[str, Any]) -> Tensors:
    return {key: value.data for key, value in parameters.items() if value is not None and key != "bias"}
