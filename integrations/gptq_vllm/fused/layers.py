"""Which decoder layers of a model run in two calls, from its construction to its reloads."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from gptq_backend.kernels import cpu_block

from ..compat import get_current_vllm_config_or_none, init_logger
from .forward import install, is_installed, remove, renew
from .match import NoMatch, find_parts, is_layer, on_cpu
from .proof import prove

logger = init_logger(f"vllm.{__name__}")


class FusedLayers:
    """The decoder layers around the linear layers of this plugin, of one model.

    vLLM tells a plugin of linear layers alone, and not whose they are. So while a model is built, this notes which
    module each was made a child of.
    """

    def __init__(self) -> None:
        self._parents: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
        self._linears: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._stop_watching: Callable[[], object] | None = None

    def __reduce__(self) -> tuple[type[FusedLayers], tuple[()]]:
        return FusedLayers, ()  # a process that is sent a config has built nothing yet

    def watch(self) -> None:
        """The model is being built."""
        if self._stop_watching is None:
            hook = register_module_module_registration_hook(_recorder(weakref.ref(self)))
            self._stop_watching = weakref.finalize(self, hook.remove)  # also where building fails

    def loaded(self, linear: nn.Module) -> None:
        """``linear`` has a weight, its first or another."""
        self._linears.add(linear)
        layer = self._layer_of(linear)
        if layer is not None and is_installed(layer):  # only where no graph was made: vLLM refuses it there
            renew(layer)

    def fuse(self) -> str | None:
        """Let the layers that can run in two calls do so -> what graphs depend on, or None if there are none."""
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None
        found = (self._layer_of(linear) for linear in self._linears if on_cpu(linear))
        layers = {id(layer): layer for layer in found if layer is not None}
        if not layers or cpu_block.fusing_is_off() or _adapters():
            return None
        reasons: dict[str, list[str]] = {}
        names = []
        for layer in layers.values():
            try:
                remove(layer)
                parts = find_parts(layer)
                prove(parts)
                install(parts)
                names.append(parts.name)
            except NoMatch as why:
                reasons.setdefault(str(why), []).append(type(layer).__name__)
            except Exception as error:  # no model fails to load because its code is unusual
                why_not = f"trying it failed ({type(error).__name__}: {error})"
                reasons.setdefault(why_not, []).append(type(layer).__name__)
        for reason, kinds in reasons.items():
            logger.info("%d %s run module by module: %s", len(kinds), kinds[0], reason)
        if names:
            turned_off = f"{cpu_block.FUSE_VARIABLE}=0 turns that off"
            logger.info("%d decoder layers run in two calls beside vLLM's attention (%s)", len(names), turned_off)
        return f"in two calls: {sorted(names)}" if names else None

    def _layer_of(self, linear: nn.Module) -> nn.Module | None:
        """The decoder layer that it is part of, if it is."""
        module: nn.Module | None = linear
        for _ in range(2):
            parent = None if module is None else self._parents.get(module)
            module = None if parent is None else parent()
        return module if module is not None and is_layer(module) else None


def _recorder(layers: weakref.ref[FusedLayers]) -> Callable[[nn.Module, str, nn.Module | None], None]:
    """A hook of torch that keeps nothing alive."""

    def record_parent(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None and (found := layers()) is not None:
            found._parents[child] = weakref.ref(parent)

    return record_parent


def _adapters() -> bool:
    """Whether LoRA adapters will be put around linear layers."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.lora_config is not None
