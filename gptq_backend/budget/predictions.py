"""What a model predicts, padding aside."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ConfigError
from ..model.calibration import Batch, model_inputs, output_mask
from ..model.placement import Placement


def predictions(model: nn.Module, batch: Batch, placement: Placement) -> Tensor:
    """Logits [tokens, V] of all places of ``batch`` at which the model predicts something.

    Raises:
        ConfigError: it does so nowhere.
    """
    inputs = model_inputs(model, batch, placement.device)
    output = model(**inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[-1] < 2:  # one logit is a number, and its share always 1
        raise ConfigError(
            f"{type(model).__name__} predicts nothing, so a budget has no divergence to go by; choose bits yourself"
        )
    rows, mask = logits.reshape(-1, logits.shape[-1]), output_mask(model, inputs)
    # A mask of other places is none of theirs.
    return rows if mask is None or mask.numel() != len(rows) else rows[mask.bool().flatten()]
