"""Which kernel serves how many layers: one line of the log when a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from .compat import init_logger

logger = init_logger(f"vllm.{__name__}")


class LoadReport:
    """Waits for the quantized layers that vLLM builds; those that it throws away again are not waited for."""

    def __init__(self) -> None:
        self._awaited: WeakSet[Any] = WeakSet()  # the methods of the layers
        self._layers: Counter[str] = Counter()  # how many, by kernel
        self.begun = False  # whether a layer was loaded

    def __reduce__(self) -> tuple[type[LoadReport], tuple[()]]:
        return LoadReport, ()  # a process that is sent a config has built nothing yet

    def expect(self, method: Any) -> None:
        """The layer of ``method`` will be loaded."""
        self._awaited.add(method)

    def loaded(self, method: Any, kernels: Iterable[str]) -> bool:
        """The layer of ``method`` is served by ``kernels`` -> whether it is the last. Then, not after reloads, it says
        which kernel serves how many.
        """
        self.begun = True
        if method not in self._awaited:
            return False
        self._awaited.discard(method)
        self._layers[" and ".join(sorted(set(kernels)))] += 1
        if self._awaited:
            return False
        counts = ", ".join(f"{count} {kernels}" for kernels, count in self._layers.most_common())
        logger.info("Quantized layers by kernel of gptq-backend: %s", counts)
        self._layers.clear()
        return True
