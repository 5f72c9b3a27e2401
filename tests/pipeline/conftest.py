"""Records the Hessians of a run."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import gptq_backend.model.layer_inputs as factors
from gptq_backend.algorithm.hessian import Hessian


@pytest.fixture
def hessians(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The matrix of every Hessian that is made, in order."""
    made: list[Tensor] = []

    class Recorded(Hessian):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self._sum)

    monkeypatch.setattr(factors, "Hessian", Recorded)
    return made
