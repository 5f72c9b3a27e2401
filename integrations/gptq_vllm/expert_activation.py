"""What is computed between the two products of an expert, also where vLLM has no operator for it."""

from __future__ import annotations

import torch
from torch import Tensor

from .compat import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation,
    apply_moe_activation_supported,
    current_platform,
)

ALTERNATING = "swigluoai"  # of gpt-oss: gate and up are channels that alternate
_NOT_ON_CPUS = ("situ", "swiglustep")


def supported(activation: MoEActivation) -> bool:
    """Whether :func:`activate` can compute ``activation`` on this platform."""
    only_elsewhere = current_platform.is_cpu() and activation.value in _NOT_ON_CPUS
    return apply_moe_activation_supported(activation) and not only_elsewhere


def activate(activation: MoEActivation, hidden: Tensor, config: ApplyMoEActivationConfig) -> Tensor:
    """hidden: float [R, N], which may be overwritten -> [R, N / 2], or [R, N] for an activation without a gate."""
    if current_platform.is_cpu():  # vLLM's build for CPUs lacks the operators with a limit
        if activation.value == ALTERNATING:
            return swiglu(hidden[:, ::2], hidden[:, 1::2], limit=7.0, alpha=1.702, beta=1.0)  # vLLM's operator too
        if activation.value in ("silu", "swigluoai_uninterleave") and config.clamp_limit is not None:
            gate, up = hidden.chunk(2, -1)
            alpha, beta = (1.0, 0.0) if activation.value == "silu" else (config.alpha, config.beta)
            return swiglu(gate, up, config.clamp_limit, alpha, beta)
    width = hidden.shape[1] // 2 if activation.is_gated else hidden.shape[1]
    activated = hidden.new_empty(hidden.shape[0], width)
    apply_moe_activation(activation, activated, hidden, activation_config=config)
    return activated


def swiglu(gate: Tensor, up: Tensor, limit: float, alpha: float, beta: float) -> Tensor:
    """gate, up: float [R, I] -> [R, I]: both within the limit, the gate times its sigmoid, times up."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)
