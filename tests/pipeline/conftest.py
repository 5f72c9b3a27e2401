"""Records the Hessians of a run."""

from __future__ import annotations

import pytest
from torch import Tensor

import gptq_backend.model.layer_inputs as factors
from gptq_backend.algorithm.hessian import Hessian


@pytest.fixture
def hessians(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The matrix of every Hessian that is made, in order."""
    made: list[Tensor] = []

    class Recorded(Hessian):
        recorded = False

        def matrix(self, name: str) -> Tensor:
            found = super().matrix(name)
            if not self.recorded:
                made.append(found)
            self.recorded = True
            return found

    monkeypatch.setattr(factors, "Hessian", Recorded)
    return made
