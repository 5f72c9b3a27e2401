"""The one quantized layer. Its parameters are the checkpoint's tensors until ``prepare`` hands them to a kernel."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .kernels import Kernel, select_kernel
from .phases import timed
from .slots import Tensors
from .weight import LinearSpec, QuantizedWeight, decode, encode, resolve

# Held while tensors change their layout, as several threads may call a layer for the first time at once. One for all
# layers, since a lock of each could not be copied with it; the forward pass of a prepared layer does not take it.
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
    dtype of x.

    Args:
        spec: shapes, dtypes and format of the stored tensors.
        name: the layer's name in the model, for messages.
        backend: row of the kernel table, or None for the fastest that fits.
        device: where to create the empty parameters.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        spec: LinearSpec,
        name: str = "linear",
        backend: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.stored_spec = self.spec = spec
        self.name, self.backend = name, backend
        self._expert = False
        self.changes = 0  # of parameters, by assignment
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self._kernel: Kernel | None = None
        if not spec.has_bias:
            self.register_parameter("bias", None)
        dtypes = spec.dtypes
        self._set({key: torch.empty(shape, dtype=dtypes[key], device=device) for key, shape in spec.shapes.items()})

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
    ) -> QuantLinear:
        """A prepared layer that holds ``weight``; bias: [N] or None, kept in its dtype.

        With a ``device`` other than that of the weight, codes are packed before they move, and it is prepared when it
        is first used there.
        """
        spec, tensors = encode(weight, checkpoint_format, word_dtype)
        if bias is not None:
            spec = dataclasses.replace(spec, has_bias=True, bias_dtype=bias.dtype)
            tensors["bias"] = bias.detach()
        layer = cls(spec, name, backend, device="meta")
        if device is None or device == weight.codes.device:
            layer._set(tensors)
            return layer.prepare()
        layer._set({key: tensor.to(device) for key, tensor in tensors.items()})
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x: float [..., K] -> [..., N] in the dtype of x."""
        if self._kernel is None:
            return self._forward_unprepared(x)
        parameters: Any = self._parameters
        bias = parameters["bias"]
        if (
            torch.compiler.is_compiling()
            or type(x) is not Tensor
            or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        ):
            return self._kernel.op(self.spec, parameters, x, bias)
        return self._kernel.apply(self.spec, parameters, x, bias)

    # torch.compiler.disable would import torch._dynamo, which takes as long as torch itself, with this module.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _forward_unprepared(self, x: Tensor) -> Tensor:
        """First call, or a layer whose weights an accelerate hook brings for this call only."""
        if not _is_offloaded(self):
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
            if self._kernel is not None and self._kernel is not self._select(self.spec):
                self.unprepare()
        if self._kernel is not None:
            return self
        stored = self._stored()
        if any(tensor.is_meta for tensor in stored.values()):
            raise CheckpointError(f"{self.name}: its weights were never loaded; load a state dict first")
        self.spec = resolve(self.stored_spec, stored, self.name)
        kernel = self._select(self.spec)
        self._set(kernel.prepare(self.spec, stored))
        self._kernel = kernel
        return self

    def _select(self, spec: LinearSpec) -> Kernel:
        device: Any = self._parameters["qweight"].device  # type: ignore[union-attr]
        return select_kernel(spec, device, self.backend, self._expert)

    @changing_layout()
    def unprepare(self) -> QuantLinear:
        """Return to the checkpoint's tensors, bit for bit."""
        if self._kernel is not None:
            stored = self._stored()
            self._kernel = None
            self._set(stored)
        return self

    @property
    def kernel(self) -> Kernel | None:
        """The row of the kernel table that serves it; None before :meth:`prepare`."""
        return self._kernel

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

    @property
    def compute_dtype(self) -> torch.dtype:
        """What adapters trained on top (PEFT) should use."""
        return self.stored_spec.scales_dtype

    def extra_repr(self) -> str:
        spec = self.spec
        kernel = self._kernel.name if self._kernel else "not prepared"
        return (
            f"{spec.in_features}, {spec.out_features}, bits={spec.bits}, group_size={spec.group_size}, "
            f"sym={spec.sym}, act_order={spec.act_order}, bias={spec.has_bias}, kernel={kernel}"
        )

    # -- storage ---------------------------------------------------------------------------------------------------

    def _stored(self) -> Tensors:
        """The checkpoint's tensors, bias excluded."""
        held = {key: value.data for key, value in self._parameters.items() if value is not None and key != "bias"}
        return held if self._kernel is None else self._kernel.unprepare(self.spec, held)

    def _set(self, tensors: Mapping[str, Tensor]) -> None:
        """Make ``tensors`` the parameters; a bias that is not among them stays."""
        for key in [key for key in self._parameters if key != "bias"]:
            del self._parameters[key]
        for key, tensor in tensors.items():
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        prepared = self._kernel is not None
        self.unprepare()

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move_only, recurse)
        return self.prepare() if prepared and not self._parameters["qweight"].is_meta else self  # type: ignore[union-attr]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_hf_hook" and self._kernel is not None and _is_offloaded(self):
            self._follow_offload(value)

    def _follow_offload(self, hook: Any) -> None:
        """accelerate has put a prepared layer on the meta device; what it will bring for each call is the
        ``state_dict()``, hence be a layer of those tensors.
        """
        device = next(value for key, value in self._parameters.items() if key != "bias").device  # type: ignore[union-attr]
        spec = self.stored_spec
        self._kernel, self.spec = None, spec
        self._set(
            {
                key: torch.empty(shape, dtype=spec.dtypes[key], device=device)
                for key, shape in spec.shapes.items()
                if key != "bias"
            }
        )
        for item in getattr(hook, "hooks", [hook]):
            if getattr(item, "original_devices", None):
                home = item.original_devices["qweight"]
                item.original_devices = {key: home for key, value in self._parameters.items() if value is not None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key, tensor in self._stored().items():
            destination[prefix + key] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unprepare()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        stored = self._stored()
        state["_kernel"], state["spec"] = None, self.stored_spec
        state["_parameters"] = {key: nn.Parameter(value, requires_grad=False) for key, value in stored.items()}
        state["_parameters"]["bias"] = self.bias
        return state | {"_was_prepared": self._kernel is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        prepared = state.pop("_was_prepared")
        super().__setstate__(state)
        if prepared:  # by a kernel of the machine that reads the copy
            self.prepare()


def _is_offloaded(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(item, "offload", False) for item in getattr(hook, "hooks", [hook]))
