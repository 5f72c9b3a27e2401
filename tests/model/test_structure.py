"""Which layers are found: a layer too many breaks a model, a layer too few stays large without a word."""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn

from gptq_backend import ConfigError, QuantizeConfig
from gptq_backend.model.structure import (
    dense_weight,
    find_blocks,
    find_structure,
    is_linear,
    linear_shapes,
    replace_module,
    special_linears,
    untie,
)


class Conv1D(nn.Module):
    """As GPT-2 has it: weight [in, out]."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.nf = out_features
        self.weight = nn.Parameter(torch.zeros(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": Conv1D(3 * width, width), "out": nn.Linear(width, width)})
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Model(nn.Module):
    def __init__(self, blocks: list[nn.Module], width: int = 8, vocabulary: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.lm_head = nn.Linear(width, vocabulary, bias=False)


class SparseMlp(nn.Module):
    """A router beside experts, as every mixture of experts has it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(width, width), "w2": nn.Linear(width, width)}) for _ in range(2)
        )
        self.shared = nn.Sequential(nn.Linear(width, width))


def names(model: nn.Module, **settings: object) -> list[str]:
    structure = find_structure(model, QuantizeConfig(group_size=4, **settings))  # type: ignore[arg-type]
    return [target.name for target in structure.targets]


def test_linear_and_conv1d_layers_of_the_blocks_are_found_and_nothing_else() -> None:
    model = Model([Block(), Block()])
    inside = ["attn.qkv", "attn.out", "mlp.0", "mlp.2"]
    assert names(model) == [f"decoder.layers.{i}.{name}" for i in range(2) for name in inside]


def test_a_nested_list_is_not_taken_for_the_blocks() -> None:
    model = Model([nn.ModuleDict({"experts": nn.ModuleList(Block() for _ in range(4))}) for _ in range(2)])
    structure = find_structure(model, QuantizeConfig())
    assert [block.name for block in structure.blocks] == ["decoder.layers.0", "decoder.layers.1"]


def test_the_heavier_of_two_towers_is_chosen_and_a_name_overrides_it() -> None:
    model = nn.ModuleDict(
        {
            "vision": nn.ModuleList(Block(4) for _ in range(4)),
            "heads": nn.ModuleList([nn.Linear(4, 2)]),
            "text": nn.ModuleList(Block(16) for _ in range(2)),
        }
    )
    assert find_structure(model, QuantizeConfig()).blocks[0].name == "text.0"
    assert find_structure(model, QuantizeConfig(), block_name="vision").blocks[3].name == "vision.3"


class Tower(nn.Module):
    def __init__(self, blocks: int, width: int, reads: bool = False) -> None:
        super().__init__()
        if reads:
            self.words = nn.Embedding(16, width)
        self.inner = nn.ModuleDict({"layers": nn.ModuleList(Block(width) for _ in range(blocks))})


class Towers(nn.Module):
    """A model that sees and reads, whose visual tower is the heavier one."""

    def __init__(self, vision: int = 16, text: int = 8, beside: bool = False) -> None:
        super().__init__()
        towers = {"vision": Tower(3, vision), "text": Tower(2, text, reads=True)}
        self.model = nn.ModuleDict(towers)
        if beside:  # the parts of the text's tower lie beside the other
            self.model = nn.ModuleDict({"vision": towers["vision"], "words": towers["text"].words})
            self.model["layers"] = towers["text"].inner["layers"]
        self.lm_head = nn.Linear(text, 16)

    def get_input_embeddings(self) -> nn.Module:
        return next(module for module in self.modules() if isinstance(module, nn.Embedding))


@pytest.mark.parametrize(("beside", "expected"), [(False, "model.text.inner.layers.0"), (True, "model.layers.0")])
def test_the_tower_of_the_token_embedding_is_chosen_however_light_it_is(beside: bool, expected: str) -> None:
    model = Towers(beside=beside)
    assert next(iter(find_blocks(model))) == expected
    named = find_structure(model, QuantizeConfig(group_size=4), "model.vision.inner.layers")
    assert named.blocks[0].name == "model.vision.inner.layers.0"


def test_a_list_of_trifles_near_the_embedding_is_not_the_language_model() -> None:
    assert next(iter(find_blocks(Towers(vision=64, text=4)))) == "model.vision.inner.layers.0"


def test_lists_that_are_equally_near_are_all_taken_but_for_lists_of_single_layers() -> None:
    """XLM has attention and feed-forward in lists beside each other, Gemma 3n projections beside its blocks."""
    model = Towers(text=16, beside=True)
    model.model["feed_forward"] = nn.ModuleList(Block(16) for _ in range(2))
    model.model["projections"] = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
    names = ["model.layers.0", "model.layers.1", "model.feed_forward.0", "model.feed_forward.1"]
    assert list(find_blocks(model)) == names
    assert list(find_blocks(model, ["model.feed_forward", "model.layers"])) == names


def test_both_stacks_of_an_encoder_decoder_are_taken() -> None:
    model = Towers(vision=8, text=16)
    model.config = types.SimpleNamespace(is_encoder_decoder=True)
    model.get_encoder, model.get_decoder = lambda: model.model["vision"], lambda: model.model["text"]
    assert list(find_blocks(model)) == [
        *(f"model.vision.inner.layers.{i}" for i in range(3)),
        *(f"model.text.inner.layers.{i}" for i in range(2)),
    ]
    model.config.is_encoder_decoder = False
    assert list(find_blocks(model)) == [f"model.text.inner.layers.{i}" for i in range(2)]


def test_a_model_that_does_not_know_its_embedding_is_judged_by_weight() -> None:
    model = Towers()
    model.get_input_embeddings = lambda: (_ for _ in ()).throw(NotImplementedError)  # type: ignore[method-assign]
    assert next(iter(find_blocks(model))) == "model.vision.inner.layers.0"


class Plain(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def __init__(self, scale: float) -> None:
        super().__init__(8, 8)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize("scales", [(1.0, 2.0), (2.0, 1.0)])
def test_layers_of_one_class_may_differ_in_what_they_compute(scales: tuple[float, float]) -> None:
    assert [is_linear(Scaled(scale)) for scale in scales] == [scale == 1.0 for scale in scales]


class Normalized(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)


class Grouped(nn.Linear):
    """Two halves of the output from two halves of the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.weight.chunk(2)
        left, right = x.chunk(2, -1)
        return torch.cat([left @ first.T, right @ second.T], -1)


class Choosing(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x).topk(1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("kind", "expected"), [(Plain, True), (Normalized, False), (Grouped, False), (Choosing, False)]
)
def test_a_layer_is_linear_by_what_it_computes(kind: type[nn.Linear], expected: bool, device: str) -> None:
    with torch.device(device):
        layer = kind(8, 6)
    assert is_linear(layer) == expected
    model = Model([nn.ModuleDict({"odd": layer, "mlp": nn.Linear(8, 8)})])
    structure = find_structure(model, QuantizeConfig(group_size=4))
    assert ("decoder.layers.0.odd" in [target.name for target in structure.targets]) == expected
    assert special_linears(structure) == ({} if expected else {"decoder.layers.0.odd": kind.__name__})


def test_routers_stay_dense_and_shared_experts_do_not() -> None:
    found = names(Model([nn.ModuleDict({"mlp": SparseMlp()})]))
    assert "decoder.layers.0.mlp.gate" not in found
    assert "decoder.layers.0.mlp.shared.0" in found
    assert sum(".experts." in name for name in found) == 4


def test_routers_in_a_module_of_their_own_stay_dense() -> None:
    """Hunyuan's and DBRX's: their code may ask for the dtype of the weight."""
    mixture = SparseMlp()
    mixture.gate = nn.ModuleDict({"wg": nn.Linear(8, 2, bias=False), "norm": nn.LayerNorm(8)})
    assert names(Model([nn.ModuleDict({"mlp": mixture})])) == names(Model([nn.ModuleDict({"mlp": SparseMlp()})]))


def test_attention_that_reads_its_weight_directly_is_left_alone() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert not is_linear(attention.out_proj)
    found = names(Model([nn.ModuleDict({"attn": attention, "mlp": nn.Linear(8, 8)})]))
    assert found == ["decoder.layers.0.mlp"]


def test_conv1d_weight_is_seen_as_out_by_in() -> None:
    block = Block()
    assert dense_weight(block.attn["qkv"]).shape == (24, 8)
    assert linear_shapes(block)["attn.qkv"] == (8, 24)
    assert linear_shapes(block)["mlp.0"] == (8, 16)


def test_edge_blocks_are_kept_but_still_listed() -> None:
    structure = find_structure(Model([Block() for _ in range(4)]), QuantizeConfig(keep_edge_blocks=1))
    assert [bool(block.targets) for block in structure.blocks] == [False, True, True, False]


def test_module_list_is_relative_to_the_block() -> None:
    model = Model([Block(), Block()])
    assert names(model, modules_in_block_to_quantize=("mlp.0",)) == ["decoder.layers.0.mlp.0", "decoder.layers.1.mlp.0"]


def test_dynamic_rules_skip_and_override_by_full_name() -> None:
    rules = {r"-:decoder\.layers\.0\.mlp": {}, r"+:.*\.mlp\.0": {"bits": 8, "group_size": -1}}
    config = QuantizeConfig(group_size=4, dynamic=rules)
    found = {target.name: target.config for target in find_structure(Model([Block(), Block()]), config).targets}
    assert not any(name.startswith("decoder.layers.0.mlp") for name in found)
    assert (found["decoder.layers.1.mlp.0"].bits, found["decoder.layers.1.mlp.0"].group_size) == (8, -1)
    assert found["decoder.layers.1.mlp.2"].bits == 4


def test_head_is_a_target_only_on_request_and_obeys_dynamic() -> None:
    model = Model([Block()])
    assert "lm_head" not in names(model)
    assert names(model, lm_head=True)[-1] == "lm_head"
    assert "lm_head" not in names(model, lm_head=True, dynamic={"-:lm_head": {}})


@pytest.mark.parametrize(
    ("model", "settings", "block_name", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), {}, None, "no list of repeated blocks"),
        (Model([nn.ModuleDict({"norm": nn.LayerNorm(8)})]), {}, None, "no list of repeated blocks"),
        (Model([Block()]), {}, "model.layers", "block_name_to_quantize='model.layers' is not a module"),
        (Model([Block(), Block()]), {"keep_edge_blocks": 1}, None, "no layer is left"),
        (Model([Block()]), {"modules_in_block_to_quantize": "mlp.fc1"}, None, "which no block has"),
        (nn.ModuleDict({"layers": nn.ModuleList([Block()])}), {"lm_head": True}, None, "no linear output embedding"),
    ],
)
def test_nothing_to_quantize_is_an_error_that_says_what_to_check(
    model: nn.Module, settings: dict[str, object], block_name: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_structure(model, QuantizeConfig(**settings), block_name)  # type: ignore[arg-type]


def shared_module() -> list[nn.Module]:
    return [Block()] * 2


def shared_parameter() -> list[nn.Module]:
    blocks = [Block(), Block()]
    blocks[1].attn["qkv"].weight = blocks[0].attn["qkv"].weight
    return blocks


def two_names_in_a_block() -> list[nn.Module]:
    block = Block()
    block.attn["again"] = block.attn["qkv"]
    return [block]


@pytest.mark.parametrize(
    ("blocks", "second"),
    [
        (shared_module, "decoder.layers.1.attn.qkv"),
        (shared_parameter, "decoder.layers.1.attn.qkv"),
        (two_names_in_a_block, "decoder.layers.0.attn.again"),
    ],
)
def test_a_weight_in_two_places_is_not_quantized_for_one_of_them(
    blocks: Callable[[], list[nn.Module]], second: str
) -> None:
    first, model = "decoder.layers.0.attn.qkv", Model(blocks())
    with pytest.raises(ConfigError, match=f"^{re.escape(first)} and {re.escape(second)} share one weight") as error:
        find_structure(model, QuantizeConfig())
    dynamic = ast.literal_eval(str(error.value).partition("rules like ")[2])
    assert set(dynamic) == {f"-:{re.escape(name)}$" for name in (first, second)}


def test_a_shared_weight_that_stays_in_16_bits_is_no_obstacle() -> None:
    found = names(Model(shared_parameter()), dynamic={r"-:.*\.attn\.qkv$": {}})
    assert found == [f"decoder.layers.{i}.{name}" for i in range(2) for name in ("attn.out", "mlp.0", "mlp.2")]


def test_untied_head_no_longer_shares_memory_with_the_embedding() -> None:
    model = Model([Block()])
    model.lm_head.weight = model.embed.weight
    untie(model.lm_head)
    assert torch.equal(model.lm_head.weight, model.embed.weight)
    assert model.lm_head.weight.data_ptr() != model.embed.weight.data_ptr()


def test_replacing_keeps_the_order_of_state_dict_keys() -> None:
    model = Model([Block(), Block()])
    before = list(model.state_dict())
    replace_module(model, "decoder.layers.0.mlp.0", nn.Linear(8, 16))
    replace_module(model, "lm_head", nn.Linear(8, 16, bias=False))
    assert list(model.state_dict()) == before
