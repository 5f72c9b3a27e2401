"""The one quantized layer. Its parameters are the checkpoint's tensors until ``prepare`` hands them to a kernel."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, ConfigError
from .format.weight import LinearSpec, QuantizedWeight, decode, empty_tensors, encode, resolve
from .kernels.slots import Tensors
from .kernels.table import Kernel, select_kernel
from .lazy_weight import LazyWeight
from .modules import effect, offloading_hook
from .timing import timed

# Held while tensors change their layout, as several threads may call a layer for the first time at once. One for all
# layers, since a lock of each could not be copied with it; the forward pass of a prepared layer does not take it: it
# reads one attribute, which is replaced as a whole.
_LOCK = threading.RLock()


@contextmanager
def changing_layout() -> Iterator[None]:
    """One thread at a time, and no inference tensors, which could never be trained with."""
    with _LOCK, torch.inference_mode(False):
        yield


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
    # The kernel, or None before prepare(), the spec that it serves, and the parameters in its layout.
    _served: tuple[Kernel | None, LinearSpec, dict[str, Any]]

    def __init__(
        self,
        spec: LinearSpec,
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
        self._serve(None, spec, tensors, None if bias is None else nn.Parameter(bias, requires_grad=False))

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
            layer._serve(None, spec, tensors, bias)
            return layer.prepare()
        layer._serve(None, spec, {key: tensor.to(device) for key, tensor in tensors.items()}, bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x: float [..., K] -> [..., N] in the dtype of x."""
        kernel, spec, parameters = self._served
        if kernel is None:
            return self._forward_unprepared(x)
        if torch.compiler.is_compiling():
            # By the module's own attribute, which tells the compiler that they are parameters.
            named: Any = self._parameters
            return kernel.op(spec, named, x, named["bias"])
        bias = parameters["bias"]
        if type(x) is not Tensor or (
            torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        ):
            return kernel.op(spec, parameters, x, bias)
        return kernel.apply(spec, parameters, x, bias)

    # torch.compiler.disable would import torch._dynamo, which takes as long as torch itself, with this module.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _forward_unprepared(self, x: Tensor) -> Tensor:
        """First call, or a layer whose weights an accelerate hook brings for this call only."""
        if offloading_hook(self) is None:
            return self.prepare()(x)
        spec = resolve(self.spec, self._stored(), self.name)
        kernel = select_kernel(spec, x.device, self.backend)
        return kernel.op(spec, kernel.prepare(spec, self._stored()), x, self.bias)

    @changing_layout()
    def prepare(self, expert: bool | None = None) -> QuantLinear:
        """Check the loaded values, choose a kernel for the device that they are on, and repack. Idempotent; threads may
        call it, or the layer, at the same time.

        Args:
            expert: see ``select_kernel``; None leaves what was said before.

        Raises:
            CheckpointError: damaged values (see :func:`weight.resolve`), or parameters that were never loaded.
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
        checked = stored if bias is None else {**stored, "bias": bias.data}
        spec = resolve(self.stored_spec, checked, self.name)
        kernel = self._select(spec)
        self._serve(kernel, spec, kernel.prepare(spec, stored), bias)
        return self

    def _select(self, spec: LinearSpec) -> Kernel:
        return select_kernel(spec, self._device, self.backend, self._expert)

    @changing_layout()
    def unprepare(self) -> QuantLinear:
        """Return to the checkpoint's tensors, bit for bit."""
        if self.kernel is not None:
            self._serve(None, self.stored_spec, self._stored(), self.bias)
        return self

    @property
    def kernel(self) -> Kernel | None:
        """The row of the kernel table that serves it; None before :meth:`prepare`."""
        return self._served[0]

    @property
    def spec(self) -> LinearSpec:
        """``stored_spec``, completed by :meth:`prepare` with what the values tell."""
        return self._served[1]

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
        self.changes += 1
        super().register_parameter(name, param)

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Take equal tensors in the place of prepared ones, for example slices of a stack of several layers'."""
        for key, tensor in tensors.items():
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=False))

    def quantized_weight(self) -> QuantizedWeight:
        """The layer's weight as the hub value."""
        stored = self._stored()
        return decode(resolve(self.stored_spec, stored, self.name), stored)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An ordinary ``nn.Linear`` with the same weight, rounded once to ``dtype``."""
        weight = self.quantized_weight().dequantize(torch.float32).to(dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype))
        return linear

    def extra_repr(self) -> str:
        spec = self.spec
        chosen = self.kernel  # once: another thread may be taking it away
        kernel = chosen.name if chosen else "not prepared"
        return (
            f"{spec.in_features}, {spec.out_features}, bits={spec.bits}, group_size={spec.group_size}, "
            f"sym={spec.sym}, act_order={spec.act_order}, bias={spec.has_bias}, kernel={kernel}"
        )

    # -- storage ---------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        """Where the layer computes."""
        if (hook := offloading_hook(self)) is not None and hook.execution_device is not None:
            return torch.device(hook.execution_device)
        return self._served[2]["qweight"].device

    def _stored(self) -> Tensors:
        """The checkpoint's tensors, bias excluded."""
        return _stored(*self._served)

    def _serve(
        self, kernel: Kernel | None, spec: LinearSpec, tensors: Mapping[str, Tensor], bias: nn.Parameter | None
    ) -> None:
        """Make ``tensors``, in the layout of ``kernel``, and ``bias`` the parameters, all at once."""
        parameters: dict[str, Any] = {"bias": bias}
        parameters |= {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in tensors.items()}
        self.changes += 1
        self._parameters = parameters
        self._served = (kernel, spec, parameters)

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        """[N, K], rounded once to ``dtype``."""
        hook = offloading_hook(self)
        with torch.inference_mode(False), torch.no_grad():
            if hook is not None:
                hook.pre_forward(self)
            try:
                kernel, spec, parameters = self._served
                wide = torch.promote_types(dtype, torch.float32)
                if kernel is None or kernel.dequantize is None:
                    return self.quantized_weight().dequantize(wide).to(dtype)
                return kernel.dequantize(spec, parameters, wide).t().to(dtype).contiguous()
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
        self._serve(None, self.stored_spec, stored | {"scales": scales}, self.bias)
        if prepared:
            self.prepare()

    def _traced_weight(self) -> Tensor:
        """The same as a part of the graph that is being made, where it vanishes if only its dtype is looked at."""
        kernel, dtype = self.kernel, self.compute_dtype
        if kernel is None or kernel.dequantize is None:
            return self._dense_weight_outside_of_graphs(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        parameters: Any = self._parameters
        return kernel.dequantize(self.spec, parameters, wide).t().to(dtype).contiguous()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _dense_weight_outside_of_graphs(self, dtype: torch.dtype) -> Tensor:
        return self._dense_weight(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        with changing_layout():
            kernel, spec, parameters = self._served
            tensors = _without_bias(parameters)
            home = tensors["qweight"].device
            device, keeps_values, shares = (home, True, False) if kernel is None else effect(fn, home)
            if shares:
                self._share(fn)
                return self
            rest = nn.Module()  # what is like that of any other module
            rest._parameters, rest._buffers, rest._modules = {"bias": self.bias}, self._buffers, self._modules
            bias = nn.Module._apply(rest, move, recurse)._parameters["bias"]
            cast = fn(torch.empty(0, dtype=self.compute_dtype, device=home)).dtype
            if cast.is_floating_point:
                self.compute_dtype = cast
            if kernel is None:
                self._serve(None, spec, {key: move(tensor) for key, tensor in tensors.items()}, bias)
                return self
            if not keeps_values:
                empty = _without_bias(empty_tensors(self.stored_spec, "meta"))
                empty = {key: move(tensor) for key, tensor in empty.items()}
                self._serve(None, self.stored_spec, empty, bias)
            elif device != home:
                moved = {key: move(tensor) for key, tensor in kernel.unprepare(spec, tensors).items()}
                self._serve(None, self.stored_spec, moved, bias)
                self.prepare()
            else:
                moved = {key: move(tensor) for key, tensor in tensors.items()}
                if bias is not self.bias or any(moved[key] is not tensor for key, tensor in tensors.items()):
                    self._serve(kernel, spec, moved, bias)
        return self

    def _share(self, share: Callable[[Tensor], Tensor]) -> None:
        """Put copies into shared memory: in place, it would be pulled from under a kernel that is reading it."""
        kernel, spec, parameters = self._served
        bias = self.bias
        if bias is not None and not bias.is_shared():
            shared = nn.Parameter(share(bias.detach().clone()), bias.requires_grad)
            shared.grad, bias = bias.grad, shared
        tensors = _without_bias(parameters)
        if bias is not self.bias or not all(tensor.is_shared() for tensor in tensors.values()):
            copies = {k: tensor if tensor.is_shared() else share(tensor.clone()) for k, tensor in tensors.items()}
            self._serve(kernel, spec, copies, bias)

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
        device = self._served[2]["qweight"].device
        self._serve(None, self.stored_spec, _without_bias(empty_tensors(self.stored_spec, device)), self.bias)
        for item in getattr(hook, "hooks", [hook]):
            if getattr(item, "original_devices", None):
                home = item.original_devices["qweight"]
                item.original_devices = {key: home for key, value in self._parameters.items() if value is not None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key, tensor in self._stored().items():
            destination[prefix + key] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    @changing_layout()
    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        concerned = any(key.startswith(prefix) and "." not in key[len(prefix) :] for key in state_dict)
        if concerned or self._load_state_dict_pre_hooks:
            self.unprepare()
            super()._load_from_state_dict(state_dict, prefix, *rest)
        elif strict:  # as above, for a state dict, an adapter's for example, that has nothing of this layer
            missing_keys += [f"{prefix}{key}" for key in self.stored_spec.shapes]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        served = state.pop("_served")
        stored, (kernel, _, parameters) = _stored(*served), served
        state["_parameters"] = {"bias": parameters["bias"]}
        state["_parameters"] |= {key: nn.Parameter(value, requires_grad=False) for key, value in stored.items()}
        return state | {"_was_prepared": kernel is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        prepared = state.pop("_was_prepared")
        super().__setstate__(state)
        self._served = (None, self.stored_spec, self._parameters)
        if prepared:  # by a kernel of the machine that reads the copy
            self.prepare()


def _stored(kernel: Kernel | None, spec: LinearSpec, parameters: Mapping[str, Any]) -> Tensors:
    held = _without_bias(parameters)
    return held if kernel is None else kernel.unprepare(spec, held)


def _without_bias(parameters: Mapping[str, Any]) -> Tensors:
    return {key: value.data for key, value in parameters.items() if value is not None and key != "bias"}
