"""The module that stands in the place of transformers' fused experts: a linear layer per expert and projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend import QuantLinear
from gptq_backend.format import ExpertLayout
from gptq_backend.kernels import Routing, cpu_experts, operators_are_seen, places
from gptq_backend.module_moves import changing_layout

from ..activations import gated_name_of, name_of
from .grouped import GroupedExperts

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "forward"


class ExpertList(nn.Module):
    """A linear layer per expert and projection, where the checkpoint has them: "0.gate_proj", say, or "w1.0".

    Args:
        fused: the module that it replaces; its settings and its activation are taken over, its parameters are not.
        experts: the projections of each expert, in the order of ``layout``.
        layout: where they are.
        fused_names: the parameters of ``fused`` that the experts stand for.
        passing: so many numbers after the last expert's hand on what they get.
    """

    act_fn: Callable[[Tensor], Tensor]

    def __init__(
        self,
        fused: nn.Module,
        experts: Sequence[Sequence[nn.Module]],
        layout: ExpertLayout,
        fused_names: tuple[str, ...],
        passing: int = 0,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.fused_class, self.fused_names = type(fused), fused_names
        for key, value in vars(fused).items():  # what the class's _apply_gate reads: clamping limits and the like
            if not key.startswith("_") and key not in ("training", "forward"):
                setattr(self, key, value)
        self.num_experts, self.passing = len(experts), passing
        for name, child in fused.named_children():
            self.add_module(name, child)
        for i, expert in enumerate(experts):
            for projection, layer in enumerate(expert):
                self._put(layout.path(projection, i), layer)
        self.training = fused.training
        self._grouped: GroupedExperts | None = None
        self._tried: tuple[Any, ...] = ()  # code, names and values of the settings that the activation was found with

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs; an expert without tokens does not run.

        Args:
            hidden_states: float [T, H].
            top_k_index: int [T, k], expert of each slot; entries >= num_experts + passing count for nothing.
            top_k_weights: float [T, k].

        Returns:
            [T, H] in the dtype of ``hidden_states``.
        """
        output = self._routed(hidden_states, top_k_index, top_k_weights)
        if self.passing:
            passed = (top_k_index >= self.num_experts) & (top_k_index < self.num_experts + self.passing)
            output = output + hidden_states * (top_k_weights * passed).sum(1, keepdim=True).to(output.dtype)
        return output

    def _routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        grouped = self._grouped
        if grouped is None or not grouped.current():
            grouped = self._group()
        if not grouped.serve(hidden_states):
            return self._by_expert(hidden_states, top_k_index, top_k_weights)
        if grouped.one_call is not None and not operators_are_seen():
            if not grouped.untouched(self._chosen(top_k_index)):
                return self._by_expert(hidden_states, top_k_index, top_k_weights)
            if self._in_one_call(hidden_states, top_k_index, top_k_weights):
                return grouped.one_call(hidden_states, top_k_index, top_k_weights)
        routing = Routing(top_k_index, self.num_experts)
        outputs = [y for call in grouped.before for y in call(hidden_states, routing, top_k_index.shape[1])]
        y = self._after(grouped.after[0](self._activate(outputs), routing, 1)[0]).unflatten(0, top_k_index.shape)
        weights = top_k_weights.float()
        if "post_expert_norm" in self._modules:  # it need not take zeros to zeros
            weights = weights.masked_fill((top_k_index < 0) | (top_k_index >= self.num_experts), 0)
        return (y.float() * weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)

    # The loop depends on the data, so a graph would break at every expert; break once around all of them.
    @torch.compiler.disable
    def _by_expert(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What :meth:`forward` says, one expert after the other; works for layers of any kind."""
        output = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if not 0 <= index < self.num_experts:
                continue
            # In ascending token order: calibration may tell the rows of padding only while rows are in place.
            tokens, slots = torch.where(top_k_index == index)
            result = self.expert(index, hidden_states[tokens]) * top_k_weights[tokens, slots, None]
            output.index_add_(0, tokens, result.to(output.dtype))
        return output

    def expert(self, index: int, x: Tensor) -> Tensor:
        """Expert ``index`` applied to x [T, H] -> [T, H]."""
        *before, down = self.projections(index)
        outputs = [projection(x) for projection in before]
        return self._after(down(self._activate(outputs)))

    def projections(self, index: int) -> list[nn.Module]:
        """The layers of expert ``index``, in the order of ``layout``."""
        return [self.get_submodule(self.layout.path(i, index)) for i in range(len(self.layout.paths))]

    def call_all(self, hidden_states: Tensor, *_: Tensor) -> None:
        """Call every expert with all tokens, as calibration may want it; the arguments are those of :meth:`forward`."""
        for index in range(self.num_experts):
            self.expert(index, hidden_states)

    def group(self) -> list[str]:
        """Multiply all experts in one call, where they allow it -> the obstacles, where they do not."""
        return self._group().obstacles

    @torch.compiler.disable
    @changing_layout()
    def _group(self) -> GroupedExperts:
        grouped = self._grouped
        if grouped is None or not grouped.current():
            self._grouped = grouped = GroupedExperts(
                {path: [self._place(path.format(i)) for i in range(self.num_experts)] for path in self.layout.paths},
                self._known_activation(),
                [place for module in self.modules() for place in _containers(module)],
            )
        return grouped

    @property
    def grouped(self) -> GroupedExperts | None:
        """What :meth:`group` found, which may be outdated."""
        return self._grouped

    def ungroup(self) -> None:
        """Forget what :meth:`group` found; the next call finds it again."""
        self._grouped = None

    def _put(self, path: str, layer: nn.Module) -> None:
        parent: Any = self
        *outer, name = path.split(".")
        for part in outer:
            if part not in parent._modules:
                parent.add_module(part, nn.ModuleDict())
            parent = parent._modules[part]
        parent.add_module(name, layer)

    def _place(self, path: str) -> tuple[dict[str, Any], str]:
        parent, _, name = path.rpartition(".")
        return self.get_submodule(parent)._modules, name

    def _in_one_call(self, x: Tensor, index: Tensor, weights: Tensor) -> bool:
        """Whether nobody expects more of it than the result: no gradient, no hook, no trace, no other activation."""
        if type(x) is not Tensor or type(weights) is not Tensor:
            return False
        if index.numel() > cpu_experts.MOST_ROWS or (torch.is_grad_enabled() and weights.requires_grad):
            return False
        return self.activates_as_known()

    def _chosen(self, index: Tensor) -> Iterable[int]:
        """The experts in ``index``, or all where those are many."""
        everyone = range(self.num_experts)
        if index.numel() > cpu_experts.MOST_ROWS:
            return everyone
        return set(index.flatten().tolist()).intersection(everyone)

    def activates_as_known(self) -> bool:
        """Whether the activation is the one that the experts were grouped with, and nobody hears it."""
        if not self._tried:
            return False
        code, names, values = self._tried
        return (
            self._code() == code and places.unchanged((vars(self),) * len(names), names, values) and not self._heard()
        )

    def _code(self) -> tuple[Any, ...]:
        """Of :meth:`_activate`."""
        module = self._modules.get("act_fn")
        return module, getattr(type(module), "forward", None), getattr(self.fused_class, "_apply_gate", None)

    def _heard(self) -> bool:
        """Whether somebody hears when the activation is called."""
        module = self._modules.get("act_fn")
        return module is not None and any(map(vars(module).get, _HOOKS))

    def _known_activation(self) -> str | None:
        """The name of what :meth:`_activate` computes, if a call for all of it knows it."""
        settings = {name: value for name, value in vars(self).items() if name[0] != "_" and name != "training"}
        self._tried = self._code(), tuple(settings), tuple(settings.values())
        if self._heard():
            return None
        if "post_expert_norm" in self._modules:
            return None
        if len(self.layout.paths) == 2 and not self.layout.joined:
            return name_of(lambda x: self._activate([x]))
        if self.layout.joined and not self.concatenated:
            return None
        return gated_name_of(
            lambda gate, up: self._activate([torch.cat([gate, up])] if self.layout.joined else [gate, up])
        )

    def _after(self, y: Tensor) -> Tensor:
        norm = self._modules.get("post_expert_norm")
        return y if norm is None else norm(y)

    def _activate(self, outputs: list[Tensor]) -> Tensor:
        if len(outputs) == 1 and not self.layout.joined:
            return self.act_fn(outputs[0])
        apply_gate = getattr(self.fused_class, "_apply_gate", None)
        if apply_gate is None:
            gate, up = outputs if len(outputs) == 2 else halves(outputs[0], -1, self.concatenated)
            return self.act_fn(gate) * up
        if self.layout.joined:
            return apply_gate(self, outputs[0])
        joined = torch.cat(outputs, -1) if self.concatenated else torch.stack(outputs, -1).flatten(-2)
        return apply_gate(self, joined)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertList:
        super()._apply(fn, recurse)
        if self._grouped is not None and not self._grouped.current():  # a cast changes no layer
            self.ungroup()
            if all(layer.kernel is not None for layer in self.modules() if isinstance(layer, QuantLinear)):
                self.group()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            self.ungroup()  # layers that change one after the other would each keep their old stack alive
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_grouped": None, "_tried": ()}

    @property
    def concatenated(self) -> bool:
        """Whether the rows of what is called gate lie before those of up in the model's matrix; else they alternate."""
        return self.layout.halves or bool(getattr(self, "is_concatenated", True))


class SortedExpertList(ExpertList):
    """As Llama 4 calls its experts: each with all tokens, scaled by the router, which is 0 for those of others."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states [E * T, H], the rows of one expert after those of another -> [E * T, H]."""
        index = torch.arange(self.num_experts, device=hidden_states.device)
        index = index.repeat_interleave(len(hidden_states) // self.num_experts)
        index = index.masked_fill(~hidden_states.any(-1), self.num_experts)  # zeros stay zeros, no expert has a bias
        return super().forward(hidden_states, index[:, None], hidden_states.new_ones(len(index), 1))

    def call_all(self, hidden_states: Tensor, *_: Tensor) -> None:
        """Each token as the router scaled it most."""
        by_expert = hidden_states.unflatten(0, (self.num_experts, -1))
        tokens = torch.arange(by_expert.shape[1], device=hidden_states.device)
        super().call_all(by_expert[by_expert.float().norm(dim=-1).argmax(0), tokens])


def _containers(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where in ``module`` those lie that :meth:`ExpertList._put` made."""
    children: Any = module._modules
    return [(children, name) for name, child in children.items() if isinstance(child, nn.ModuleDict)]


def halves(tensor: Tensor, dim: int, concatenated: bool) -> tuple[Tensor, Tensor]:
    """Gate and up, of which one lies behind the other (``concatenated``) or which alternate along ``dim``."""
    if concatenated:
        gate, up = tensor.chunk(2, dim)
        return gate, up
    along = tensor.movedim(dim, 0)
    return along[::2].movedim(0, dim), along[1::2].movedim(0, dim)
