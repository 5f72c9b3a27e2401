"""Find what to quantize by the shape of a model, not by a table of architectures."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QuantizeConfig
from ..errors import ConfigError
from .file_format import check_layer, file_format

# Layers that models do not call: Mamba's code hands the weight of this one to a kernel.
_READ_BY_WEIGHT = {"dt_proj"}
_LEAST_SHARE = 1 / 32  # of the heaviest list's weights, for another to be the language model's

BlockNames = str | Sequence[str] | None  # full names of the lists of blocks; None chooses


@dataclass(frozen=True, eq=False)
class Target:
    """One layer to quantize."""

    name: str  # full module name
    module: nn.Module  # an nn.Linear (or subclass), or a Conv1D as GPT-2 has it, whose weight is [K, N]
    config: QuantizeConfig  # settings after the dynamic rules
    may_be_idle: bool = False  # one of several experts, of which a router may choose others for every calibration token


@dataclass(frozen=True, eq=False)
class Block:
    """One of the model's repeated blocks, by its full name, and the layers to quantize in it, in module order."""

    name: str
    module: nn.Module
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Structure:
    """What of a model is to be quantized."""

    blocks: tuple[Block, ...]  # all repeated blocks in order, also those without targets
    head: Target | None  # the output embedding, when the config asks for it

    @property
    def targets(self) -> tuple[Target, ...]:
        inside = tuple(target for block in self.blocks for target in block.targets)
        return inside + ((self.head,) if self.head else ())

    @property
    def checkpoint_format(self) -> str:
        """Of the file, see :func:`file_format.file_format`: all targets' settings have it."""
        return self.targets[0].config.checkpoint_format

    def widths(self, config: QuantizeConfig) -> dict[str, int]:
        """Bits of all that will be quantized, by name."""
        embedding = {} if config.embed_bits is None else {"the embedding of tokens": config.embed_bits}
        return {target.name: target.config.bits for target in self.targets} | embedding

    def describe(self, config: QuantizeConfig) -> QuantizeConfig:
        """``config`` with ``dynamic`` rules for what stays in 16 bits: edge blocks, and layers read by their weight."""
        keep = config.keep_edge_blocks
        edges = self.blocks[:keep] + self.blocks[-keep:] if keep else ()
        rules: dict[str, Mapping[str, Any]] = {f"-:{re.escape(block.name)}\\.": {} for block in edges}
        names = {name.rpartition(".")[2] for block in self.blocks for name, _ in block.module.named_modules()}
        rules |= {f"-:.*\\.{name}$": {} for name in sorted(names & _READ_BY_WEIGHT)}
        if not rules:
            return config
        return dataclasses.replace(config, keep_edge_blocks=0, dynamic={**rules, **(config.dynamic or {})})


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer that stores its weight as [K, N]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes ``x @ W + b`` from an unquantized 2-D weight."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight directly
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return _computes_product(module)
    return isinstance(module, nn.Linear) or is_conv1d(module)


_tried: dict[tuple[Any, ...], bool] = {}


def _computes_product(module: nn.Linear) -> bool:
    """Whether a subclass with a ``forward`` of its own still computes ``x @ W + b``: routers that choose experts,
    layers that work on groups of channels or on a normalized weight do not. It is tried on random numbers.
    """
    shape = dense_weight(module).shape
    settings = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    key = (type(module), shape, module.bias is None, *sorted(settings.items()))
    if key in _tried:
        return _tried[key]
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu")

    weight, x = numbers(*shape), numbers(2, 3, shape[1])
    bias = None if module.bias is None else numbers(shape[0])
    expected = nn.functional.linear(x, weight, bias)
    trial = copy.copy(module)
    others = {key: each for key, each in module._parameters.items() if key not in ("weight", "bias")}
    trial.__dict__["_parameters"] = {"weight": weight, "bias": bias, **others}
    try:
        with torch.no_grad(), torch.device("cpu"):
            found = type(module).forward(trial, x)
        same = isinstance(found, Tensor) and found.shape == expected.shape
        same = same and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    except Exception:  # whatever the code of a model raises for what it was not made for
        same = False
    _tried[key] = same
    return same


def dense_weight(module: nn.Module) -> Tensor:
    """The weight as [N, K], a view of the module's parameter."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if is_conv1d(module) else weight


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every linear layer of ``model``, by name; weights may be on meta."""
    weights = {name: dense_weight(module) for name, module in model.named_modules() if is_linear(module)}
    return {name: (weight.shape[1], weight.shape[0]) for name, weight in weights.items()}


def find_blocks(model: nn.Module, block_name: BlockNames = None) -> dict[str, nn.Module]:
    """The repeated blocks of ``model`` in the order of its modules, by full name.

    They are the children of the modules called ``block_name``, or of outermost ``nn.ModuleList`` with linear layers:
    those nearest to the embedding of tokens, so that of a model that sees and reads, the tower that reads is taken. Of
    a model that does not tell its embedding, it is the one with most weights. An encoder-decoder has them in both of
    its stacks. Lists that are small beside another, like the heads of a byte model, do not count.

    Raises:
        ConfigError: no repeated blocks, or ``block_name`` names something else.
    """
    wanted = [block_name] if isinstance(block_name, str) else block_name
    names = _lists_of_blocks(model) if wanted is None else list(wanted)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    for name in names:
        if name not in order:
            raise ConfigError(f"block_name_to_quantize={name!r} is not a module of the model")
        if not _may_hold_blocks(model.get_submodule(name)):
            raise ConfigError(
                f"block_name_to_quantize={name!r} is no list of blocks: it is empty, or has linear layers of its own; "
                f"the lists of this model are {', '.join(_lists_of_blocks(model))}"
            )
        if inner := next((each for each in names if each.startswith(f"{name}.")), None):
            raise ConfigError(
                f"block_name_to_quantize names {name!r} and {inner!r}, which lies in it; name one of them"
            )
    found: dict[str, nn.Module] = {}
    for name in sorted(names, key=order.__getitem__):
        prefix = f"{name}." if name else ""
        # named_children() would skip a block that was there before.
        children = model.get_submodule(name)._modules
        found |= {prefix + child: block for child, block in children.items() if block is not None}
    return found


def find_structure(model: nn.Module, config: QuantizeConfig, block_name: BlockNames = None) -> Structure:
    """Blocks and layers of ``model`` that ``config`` selects; the blocks are those of :func:`find_blocks`.

    Routers stay in 16 bits: linear layers that are children of a module that also has a child ``experts``, or that are
    alone in a child. So do Mamba's ``dt_proj``.

    Raises:
        ConfigError: no repeated blocks, no layer left to quantize, one that shares its weight with another, or settings
            that no run knows or that do not fit a layer.
    """
    config.check_quantizer_settings()
    blocks = find_blocks(model, block_name)
    last = len(blocks) - config.keep_edge_blocks
    found = []
    for i, (name, block) in enumerate(blocks.items()):
        inside = config.keep_edge_blocks <= i < last
        found.append(Block(name, block, _targets(name, block, config) if inside else ()))
    _check_wanted([*blocks.values()], config)
    structure = Structure(tuple(found), _head(model, config) if config.lm_head else None)
    if not structure.targets:
        raise ConfigError(
            f"no layer is left to quantize in the blocks {', '.join(blocks)}; check dynamic, "
            "modules_in_block_to_quantize and keep_edge_blocks"
        )
    if (chosen := file_format(structure.widths(config), config)) != config.checkpoint_format:
        return find_structure(model, dataclasses.replace(config, checkpoint_format=chosen), block_name)
    _check_shared(structure)
    for target in structure.targets:
        target.config.check_quantizer_settings()
        check_layer(target.name, dense_weight(target.module).shape, target.config, config)
    return structure


def special_linears(structure: Structure) -> dict[str, str]:
    """Layers of the blocks, by name, that are linear by their class and not by what they compute, with that class.

    Routers, which stay as they are in any case, are not among them.
    """
    found = {}
    for block in structure.blocks:
        for name, module in block.module.named_modules(prefix=block.name):
            if experts_of(module):
                continue
            for key, child in module.named_children():
                if isinstance(child, nn.Linear) and not is_linear(child):
                    found[f"{name}.{key}"] = type(child).__name__
    return found


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode; afterwards each as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The embedding of tokens, of a model that tells which one that is."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        found = getter() if getter else None
    except (NotImplementedError, AttributeError):  # of transformers, for a model without
        return None
    return found if isinstance(found, nn.Module) else None


def _may_hold_blocks(module: nn.Module) -> bool:
    """Whether its children can be blocks: it has some, and none is a linear layer."""
    children = list(module.children())
    return bool(children) and not any(map(is_linear, children))


def _lists_of_blocks(model: nn.Module) -> list[str]:
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    # A list of nothing but linear layers holds projections.
    repeated = {name: each for name, each in lists.items() if not all(map(is_linear, each))}
    sizes = {name: size for name, module in repeated.items() if (size := _linear_elements(module))}
    if not sizes:
        raise ConfigError(
            f"{type(model).__name__} has no list of repeated blocks with linear layers; name the list with "
            "block_name_to_quantize"
        )
    most = max(sizes.values())
    sizes = {name: size for name, size in sizes.items() if size >= _LEAST_SHARE * most}
    names = {id(module): name for name, module in model.named_modules()}
    found: list[str] = []
    for stack in _stacks(model) or [model]:
        prefix = f"{names[id(stack)]}."
        inside = {name: size for name, size in sizes.items() if name.startswith(prefix) or stack is model}
        start = names.get(id(input_embeddings(stack)))
        if start is None:
            found += [max(inside, key=inside.__getitem__)] if inside else []
        else:
            steps = {name: _distance(start, name) for name in inside}
            found += [name for name in steps if steps[name] == min(steps.values())]
    return found


def _stacks(model: nn.Module) -> list[nn.Module]:
    """The encoder and the decoder of a model with both, as it tells them; [] of any other."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    found = [getter() for name in ("get_encoder", "get_decoder") if (getter := getattr(model, name, None)) is not None]
    inner = {id(module) for module in model.modules()} - {id(model)}
    stacks = [stack for stack in found if id(stack) in inner]
    return stacks if len({id(stack) for stack in stacks}) == 2 else []


def _distance(start: str, name: str) -> tuple[int, int]:
    """From one module to another in the tree of names: steps up to their common parent, then steps down."""
    first, second = start.split("."), name.split(".")
    common = 0
    while common < min(len(first), len(second)) and first[common] == second[common]:
        common += 1
    return len(first) - common, len(second) - common


def _linear_elements(module: nn.Module) -> int:
    """Of linear layers, those that are quantized already included."""
    dense = sum(dense_weight(child).numel() for child in module.modules() if is_linear(child))
    quantized: Any = [child for child in module.modules() if "qweight" in child._parameters]
    return dense + sum(child.in_features * child.out_features for child in quantized)


def _targets(block_name: str, block: nn.Module, config: QuantizeConfig) -> tuple[Target, ...]:
    wanted = config.modules_in_block_to_quantize
    mixtures = {module: parts for module in block.modules() if (parts := experts_of(module))}
    routers = {router for module, parts in mixtures.items() for router in _routers(module, parts)}
    experts = {module for parts in mixtures.values() for part in parts for module in part.modules()}
    found = []
    for name, module in block.named_modules():
        if not is_linear(module) or module in routers or (wanted is not None and name not in wanted):
            continue
        if name.rpartition(".")[2] in _READ_BY_WEIGHT:
            continue
        layer_config = config.for_module(f"{block_name}.{name}")
        if layer_config is not None:
            found.append(Target(f"{block_name}.{name}", module, layer_config, may_be_idle=module in experts))
    return tuple(found)


def experts_of(module: nn.Module) -> list[nn.Module]:
    """The children of a mixture that hold its experts: that called so, or lists of layers that are called."""
    if isinstance(experts := getattr(module, "experts", None), nn.Module):
        return [experts]
    lists = (child for child in module.children() if isinstance(child, nn.ModuleList))
    called = (each for each in lists if type(each).forward is not nn.ModuleList.forward)
    return [each for each in called if all(isinstance(layer, nn.Linear) for layer in each)]


def _routers(mixture: nn.Module, experts: list[nn.Module]) -> Iterator[nn.Module]:
    """Linear layers beside the experts, also one alone in a module of its own, which may read its weight.

    Not if that one has as many outputs as inputs, as a shared expert has.
    """
    for child in mixture.children():
        inside = [module for module in child.modules() if is_linear(module)]
        if is_linear(child):
            yield child
        elif len(inside) == 1 and child not in experts and len({*dense_weight(inside[0]).shape}) == 2:
            yield inside[0]


def _check_wanted(blocks: list[nn.Module], config: QuantizeConfig) -> None:
    """Raises ConfigError for a name in modules_in_block_to_quantize that no block has."""
    present = {name for block in blocks for name, module in block.named_modules() if is_linear(module)}
    for name in config.modules_in_block_to_quantize or ():
        if name not in present:
            raise ConfigError(
                f"modules_in_block_to_quantize names {name!r}, which no block has; its linear layers are "
                f"{', '.join(sorted(present))}"
            )


def _check_shared(structure: Structure) -> None:
    """Raises ConfigError where a weight to quantize is in several places, of which each has inputs of its own."""
    owners: dict[int, list[str]] = {}
    for block in structure.blocks:
        for name, module in block.module.named_modules(prefix=block.name, remove_duplicate=False):
            # Not by attribute: a parametrized layer makes its weight anew for everyone who asks.
            if is_linear(module) and (weight := module._parameters.get("weight")) is not None:
                owners.setdefault(id(weight), []).append(name)
    wanted = {target.name for target in structure.targets}
    shared = [names for names in owners.values() if len(names) > 1 and wanted.intersection(names)]
    if shared:
        first, second = shared[0][:2]
        rules: dict[str, Any] = {f"-:{re.escape(name)}$": {} for name in (first, second)}
        raise ConfigError(
            f"{first} and {second} share one weight ({len(shared)} weights are shared), and each would be quantized "
            f"for its own inputs; give each a copy, or keep all of them in 16 bits with dynamic rules like {rules}"
        )


def _head(model: nn.Module, config: QuantizeConfig) -> Target | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else getattr(model, "lm_head", None)
    if head is None or not is_linear(head):
        raise ConfigError(f"lm_head=True, but {type(model).__name__} has no linear output embedding; set it to False")
    name = next(name for name, module in model.named_modules() if module is head)
    layer_config = config.for_module(name)
    return None if layer_config is None else Target(name, head, layer_config)


def untie(module: nn.Module) -> None:
    """Give the module a weight of its own, so that replacing it leaves the input embedding alone."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
