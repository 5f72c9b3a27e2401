"""Fixtures of the commands' tests that these use, too, and what several files count."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cli.conftest import offline, original

__all__ = ["offline", "original"]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call ran."""
    from gptq_backend.kernels import cpu_layers

    counted: list[int] = []
    stock = cpu_layers.run_layers

    def run(layers: Any, *args: Any) -> Any:
        counted.append(len(layers))
        return stock(layers, *args)

    monkeypatch.setattr(cpu_layers, "run_layers", run)
    return counted


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The decoder layers that were called one by one."""
    from gptq_transformers.fused.forward import FusedForward

    found: list[Any] = []
    call = FusedForward.__call__

    def noting(self: FusedForward, *args: Any, **kwargs: Any) -> Any:
        found.append(self.layer)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(FusedForward, "__call__", noting)
    return found
