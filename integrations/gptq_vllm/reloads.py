"""Which reload of a model vLLM is making, also after one that it aborted."""

from __future__ import annotations

import weakref

from torch import nn

from .compat import get_layerwise_info, initialize_online_processing, restore_layer_on_meta


class Reloads:
    """Counts the reloads of a model, of which vLLM announces none. All layers of the model share this.

    When a reload begins, vLLM awaits the tensors of every layer; when a layer is loaded, it no longer does. So if it
    awaits those of a layer that was loaded, another reload has begun. One that vLLM aborts before any layer was loaded,
    for no fault found here, goes unnoticed: the next is taken for the rest of it.
    """

    def __init__(self) -> None:
        self.number, self._failed = 0, False
        self._loaded: weakref.ref[nn.Module] | None = None  # one of the layers that this reload has loaded

    def another_began(self) -> bool:
        """Whether vLLM has begun a reload that is not counted yet."""
        layer = None if self._loaded is None else self._loaded()
        return self._failed or (layer is not None and get_layerwise_info(layer).can_load())

    def count(self) -> None:
        """Another reload has begun."""
        self.number, self._failed, self._loaded = self.number + 1, False, None

    def failed(self) -> None:
        """An error ends this reload."""
        self._failed = True

    def loaded(self, layer: nn.Module) -> None:
        """All of ``layer`` has come."""
        if self._loaded is None or self._loaded() is None:
            self._loaded = weakref.ref(layer)


def await_again(layer: nn.Module) -> None:
    """Let vLLM await all tensors of ``layer`` again, which could not be made of those that came."""
    info = get_layerwise_info(layer)
    info.loaded_weights.clear()
    restore_layer_on_meta(layer, info)
    initialize_online_processing(layer)
