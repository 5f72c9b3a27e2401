"""The longest sequence that a model says it takes."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from gptq_backend import CalibrationError
from gptq_backend.model.calibration import check_fits


@pytest.mark.parametrize(("written", "meant"), [(128, 128), (-1, None), (0, None), (None, None)])
def test_a_limit_that_is_not_positive_is_none(written: int | None, meant: int | None) -> None:
    model = nn.Linear(1, 1)
    model.config = types.SimpleNamespace(max_position_embeddings=written)  # type: ignore[assignment]
    batches = [{"input_ids": torch.zeros(1, 200, dtype=torch.long)}]
    if meant is None:
        check_fits(model, batches)
    else:
        with pytest.raises(CalibrationError, match="takes at most 128"):
            check_fits(model, batches)
