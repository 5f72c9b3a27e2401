"""What the tests of a whole run share: settings, names, and the Hessians that a run should have made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend import QuantizeConfig, QuantLinear


def config(**settings: Any) -> QuantizeConfig:
    """All tokens count the same, so that Hessians can be compared with plain second moments."""
    return QuantizeConfig(**{"bits": 4, "group_size": 16, "token_weights": False, **settings})


def quantized_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def second_moments(model: nn.Module, names: list[str], data: list[Tensor]) -> dict[str, Tensor]:
    """``sum x x^T`` at the input of each module as the model is now."""
    found: dict[str, Tensor] = {}

    def add(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            found[name] = found.get(name, 0) + rows.t() @ rows

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(add(name)) for name in names]
    with torch.no_grad():
        for ids in data:
            model(ids[None])
    for handle in handles:
        handle.remove()
    return found


def assert_upper_equal(made: Tensor, expected: Tensor) -> None:
    """Up to the rounding of float32: the kernels do not sum in the order of torch."""
    torch.testing.assert_close(made.triu(), expected.triu(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
