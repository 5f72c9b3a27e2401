"""Layers in other tools' layouts: their values against definitions written out here, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_backend import CheckpointError, ConfigError, QuantizeConfig, QuantizedWeight
from gptq_backend.format import (
    ForeignLayer,
    as_gptq,
    read_manifest,
    read_packed,
    read_tensor,
    resolve_specs,
    write_awq,
    write_compressed_tensors,
)

FORMATS = Path(__file__).parents[1] / "data" / "formats"
AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def scheme(**weights: Any) -> dict[str, Any]:
    return {**COMPRESSED, "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "int", **weights}}}}


def stored(tmp_path: Path, parts: Mapping[str, Tensor], source: Mapping[str, Any]) -> QuantizedWeight:
    """Layer ``l`` as anybody reads it from a file with these tensors."""
    file = tmp_path / "model.safetensors"
    save_file({f"l.{part}": tensor.contiguous() for part, tensor in parts.items()}, file)
    config = QuantizeConfig.from_dict(source)
    manifest = as_gptq(read_manifest([file]), config)
    spec = resolve_specs(manifest, config)["l"]
    return read_packed(spec, {part: read_tensor(manifest[f"l.{part}"]) for part in spec.shapes}, "l").unpack()


def weight(features: int, outputs: int, groups: int, bits: int, seed: int, sym: bool = False) -> QuantizedWeight:
    make = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (features, outputs), generator=make).to(torch.uint8)
    zeros = torch.randint(0, 1 << bits, (groups, outputs), generator=make).to(torch.uint8)
    if sym:
        zeros.fill_(1 << (bits - 1))
    scales = torch.rand(groups, outputs, generator=make).to(torch.float16) + 0.01
    g_idx = torch.arange(features, dtype=torch.int32) // (features // groups)
    return QuantizedWeight(codes, scales, zeros, g_idx, bits)


def assert_same(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert found.bits == expected.bits
    for part in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part


shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(0, 1 << 30))


def awq_by_definition(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Nibble i of a word is channel (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight, one at a time."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def pack(codes: Tensor) -> Tensor:
        words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
        for i, channel in enumerate(order):
            words |= codes[:, channel::8].long() << (4 * i)
        return words.to(torch.int32)  # wraps

    return {"qweight": pack(weight.codes), "qzeros": pack(weight.zeros), "scales": weight.scales}


@settings(deadline=None, max_examples=25)
@given(shapes)
def test_awq_lies_as_its_definition_says(tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...]) -> None:
    groups, outputs, size, seed = shape
    original = weight(groups * size * 8, outputs * 8, groups, 4, seed)
    parts = awq_by_definition(original)
    for part, tensor in write_awq("l", original).items():
        assert torch.equal(tensor, parts[part]), part
    source = {**AWQ, "group_size": size * 8}
    assert_same(stored(tmp_path_factory.mktemp("awq"), parts, source), original)


@settings(deadline=None, max_examples=25)
@given(shapes, st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_compressed_tensors_comes_back(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], bits: int, sym: bool
) -> None:
    groups, outputs, size, seed = shape
    original = weight(groups * size * 16, outputs * 5, groups, bits, seed, sym)
    source = scheme(num_bits=bits, group_size=size * 16, symmetric=sym)
    assert_same(stored(tmp_path_factory.mktemp("ct"), write_compressed_tensors(original), source), original)


def test_compressed_tensors_keeps_act_order(tmp_path: Path) -> None:
    original = weight(64, 16, 4, 4, 0)
    shuffled = original.g_idx[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    original = QuantizedWeight(original.codes, original.scales, original.zeros, shuffled, 4)
    parts = write_compressed_tensors(original)
    assert_same(stored(tmp_path, parts, scheme(num_bits=4, group_size=16, symmetric=False, actorder="group")), original)


def test_zeros_that_are_not_packed_and_one_scale_for_all_are_read(tmp_path: Path) -> None:
    original = weight(32, 8, 1, 4, 3)
    parts = write_compressed_tensors(original) | {
        "weight_zero_point": (original.zeros.t().int() - 8).to(torch.int8),
        "weight_scale": torch.tensor([0.25]),
    }
    found = stored(tmp_path, parts, scheme(num_bits=4, strategy="tensor", symmetric=False))
    assert torch.equal(found.zeros, original.zeros)
    assert found.scales.unique().tolist() == [0.25]


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_codes_of_odd_widths_are_held_in_eight_bits_around_the_same_middle(tmp_path: Path, bits: int) -> None:
    original = weight(64, 32, 2, bits, bits)
    differences = original.codes.int() - original.zeros.int().repeat_interleave(32, 0)
    found = stored(tmp_path, write_compressed_tensors(original), scheme(num_bits=bits, group_size=32, symmetric=False))
    assert found.bits == 8
    assert torch.equal(found.codes.int() - found.zeros.int().repeat_interleave(32, 0), differences)


# -- the tools' own files ----------------------------------------------------------------------------------------------


def test_what_autoawq_wrote_is_written_again_bit_for_bit() -> None:
    tensors = load_file(FORMATS / "awq-gemm" / "model.safetensors")
    config = QuantizeConfig.from_dict({**AWQ, "group_size": 32})
    manifest = as_gptq(read_manifest([FORMATS / "awq-gemm" / "model.safetensors"]), config)
    specs = resolve_specs(manifest, config)
    assert specs
    for name, spec in specs.items():
        parts = {part: read_tensor(manifest[f"{name}.{part}"]) for part in spec.shapes}
        again = write_awq(name, read_packed(spec, parts, name).unpack())
        for part in ("qweight", "qzeros", "scales"):
            assert torch.equal(again[part], tensors[f"{name}.{part}"]), f"{name}.{part}"


def test_what_compressed_tensors_wrote_is_written_again_bit_for_bit() -> None:
    tensors = load_file(FORMATS / "ct-w4a16-asym" / "model.safetensors")
    config = QuantizeConfig.from_dict(scheme(num_bits=4, group_size=32, symmetric=False))
    manifest = as_gptq(read_manifest([FORMATS / "ct-w4a16-asym" / "model.safetensors"]), config)
    for name, spec in resolve_specs(manifest, config).items():
        parts = {part: read_tensor(manifest[f"{name}.{part}"]) for part in spec.shapes}
        for part, tensor in write_compressed_tensors(read_packed(spec, parts, name).unpack()).items():
            assert torch.equal(tensor, tensors[f"{name}.{part}"]), f"{name}.{part}"


def test_a_manifest_of_gptq_stays_as_it_is_and_a_translated_one_too() -> None:
    peers = FORMATS.parent / "checkpoints" / "llama-4-32-sym" / "model.safetensors"
    manifest = read_manifest([peers])
    config = QuantizeConfig()
    assert all(as_gptq(manifest, config)[key] is info for key, info in manifest.items())
    config = QuantizeConfig.from_dict({**AWQ, "group_size": 32})
    once = as_gptq(read_manifest([FORMATS / "awq-gemm" / "model.safetensors"]), config)
    again = as_gptq(once, config)
    assert again.keys() == once.keys()
    assert all(again[key] is info for key, info in once.items())
    assert any(isinstance(info.file, ForeignLayer) for info in once.values())


def test_a_translated_layer_can_be_pickled() -> None:
    file = FORMATS / "awq-gemm" / "model.safetensors"
    manifest = as_gptq(read_manifest([file]), QuantizeConfig.from_dict({**AWQ, "group_size": 32}))
    info = manifest["model.layers.0.mlp.up_proj.qweight"]
    assert torch.equal(read_tensor(pickle.loads(pickle.dumps(info))), read_tensor(info))


# -- damaged files -----------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor]], None]


def _set(part: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda parts: parts.__setitem__(part, change(parts[part]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("qzeros"), r"l: qzeros is missing, expected qweight, qzeros, scales"),
        (_set("qzeros", lambda t: t[:1]), r"l.qzeros has shape \[1, 2\], expected \[2, 2\]"),
        (_set("scales", lambda t: t * float("inf")), r"l.scales: .* are NaN or infinite"),
        (_set("scales", lambda t: t.to(torch.int32)), r"l.scales is torch.int32 of shape"),
    ],
)
def test_a_damaged_awq_layer_is_refused_by_name(tmp_path: Path, change: Change, message: str) -> None:
    parts = awq_by_definition(weight(64, 16, 2, 4, 0))
    change(parts)
    with pytest.raises(CheckpointError, match=message):
        stored(tmp_path, parts, {**AWQ, "group_size": 32})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("weight_shape"), "l: weight_shape is missing"),
        (_set("weight_shape", lambda t: t + 1), "expected"),
        (_set("weight_scale", lambda t: t[:3]), r"l.weight_scale has shape \[3, 2\], expected \[16, 2\]"),
        (_set("weight_packed", lambda t: t[:, :5]), "l.weight_packed has 5 words for 64 inputs"),
        (_set("weight_packed", lambda t: t[:, :-1]), "l.weight_packed has 7 words for 64 inputs, which make codes of"),
        (_set("weight_packed", lambda t: t.to(torch.uint8)), r"l.weight_packed is torch.uint8"),
        (_set("weight_zero_point", lambda t: t[:1]), r"l.weight_zero_point has shape"),
        (lambda parts: parts.pop("weight_zero_point"), "l: weight_zero_point is missing, though the config says symm"),
        (lambda parts: parts.pop("weight_scale"), "l: weight_scale is missing"),
        (lambda parts: parts.pop("weight_packed"), "l: .*weight_shape.* are stored without weight_packed"),
        (_set("weight_shape", lambda t: t.float()), "l.weight_shape is no pair of integers"),
    ],
)
def test_a_damaged_layer_of_compressed_tensors_is_refused_by_name(tmp_path: Path, change: Change, message: str) -> None:
    parts = write_compressed_tensors(weight(64, 16, 2, 4, 0))
    change(parts)
    with pytest.raises(CheckpointError, match=message):
        stored(tmp_path, parts, scheme(num_bits=4, group_size=32, symmetric=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("weight_g_idx"), "l: weight_g_idx is missing or was never filled, though the config"),
        (_set("weight_g_idx", lambda t: torch.full_like(t, -1)), "l: weight_g_idx is missing or was never filled"),
        (_set("weight_g_idx", lambda t: t.bool()), r"l.weight_g_idx is torch.bool of shape \[64\], expected integers"),
        (_set("weight_g_idx", lambda t: t[None]), r"l.weight_g_idx is torch.int32 of shape \[1, 64\]"),
        (_set("weight_g_idx", lambda t: t - 1), r"l.weight_g_idx: values span -1..2, expected 0..3"),
        (
            _set("weight_g_idx", lambda t: t.index_fill(0, torch.tensor([5]), 2**31 - 1)),
            r"span 0..2147483647, expected",
        ),
    ],
)
def test_a_damaged_order_is_refused_before_anything_is_counted(tmp_path: Path, change: Change, message: str) -> None:
    made = weight(64, 16, 4, 4, 0)
    shuffled = made.g_idx[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    parts = write_compressed_tensors(QuantizedWeight(made.codes, made.scales, made.zeros, shuffled, 4))
    change(parts)
    with pytest.raises(CheckpointError, match=message):
        stored(tmp_path, parts, scheme(num_bits=4, group_size=16, symmetric=False, actorder="group"))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("g_idx", lambda t: t[None], r"g_idx has shape \[1, 64\], expected \[64\]"),
        ("g_idx", lambda t: t + 7, r"g_idx: values span 7"),
        ("qweight", lambda t: t[0, 0], r"qweight has shape \[\]"),
    ],
)
def test_a_damaged_layer_in_planes_is_refused_by_name(
    tmp_path: Path, part: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    name = "model.layers.0.mlp.up_proj"
    tensors = load_file(FORMATS / "gptq-5bit" / "model.safetensors")
    parts = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    parts[part] = change(parts[part])
    source = json.loads((FORMATS / "gptq-5bit" / "config.json").read_text())["quantization_config"]
    with pytest.raises(CheckpointError, match=message):
        stored(tmp_path, parts, source)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"s": torch.zeros(1, 64), "workspace": torch.zeros(16)}, "l: B is missing"),
        ({"B": torch.zeros(4, 128, dtype=torch.int32)}, "l: s is missing"),
        (
            {"weight": torch.zeros(8, 8, dtype=torch.int8), "weight_scale": torch.zeros(8, 1)},
            "l: weight_scale, weight are stored without weight_packed",
        ),
    ],
)
def test_a_part_that_is_left_alone_is_missed(tmp_path: Path, parts: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored(tmp_path, parts, scheme(num_bits=4))


def test_an_awq_layer_without_its_last_inputs_is_no_layer_with_a_smaller_group(tmp_path: Path) -> None:
    parts = awq_by_definition(weight(64, 16, 2, 4, 0))
    parts["qweight"] = parts["qweight"][:-1]
    with pytest.raises(CheckpointError, match="l has 2 groups for 63 inputs, expected groups of one size"):
        stored(tmp_path, parts, {**AWQ, "group_size": 32})


@pytest.mark.parametrize("version", ["gemv", "gemv-fast"])
@pytest.mark.parametrize("size", [32, -1])
def test_a_wrong_group_size_of_padded_scales_is_found_out(tmp_path: Path, version: str, size: int) -> None:
    name = "model.layers.0.mlp.down_proj"
    tensors = load_file(FORMATS / f"awq-{version}" / "model.safetensors")
    layer = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
    source = {**AWQ, "version": version.replace("-", "_"), "group_size": size}
    with pytest.raises(CheckpointError, match=r"correct group_size in the config"):
        stored(tmp_path, layer, source)


def with_gaps(codes: Tensor, bits: int) -> Tensor:
    """[K, N] -> int32 [words, N]: ``32 // bits`` codes to a word, as compressed-tensors packed them before 0.20."""
    fit = 32 // bits
    padded = torch.cat([codes, codes.new_zeros(-len(codes) % fit, codes.shape[1])]).long().view(-1, fit, codes.shape[1])
    return sum(padded[:, i] << bits * i for i in range(fit)).to(torch.int32)  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_codes_with_gaps_between_words_are_read_as_compressed_tensors_once_wrote_them(
    tmp_path: Path, bits: int
) -> None:
    original = weight(64, 32, 2, bits, bits)
    parts = write_compressed_tensors(original) | {
        "weight_packed": with_gaps(original.codes, bits).t(),
        "weight_zero_point": with_gaps(original.zeros.t(), bits),
    }
    found = stored(tmp_path, parts, scheme(num_bits=bits, group_size=32, symmetric=False))
    expected = original.codes.int() - original.zeros.int().repeat_interleave(32, 0)
    assert torch.equal(found.codes.int() - found.zeros.int().repeat_interleave(32, 0), expected)


def test_widths_that_fill_as_many_words_are_not_guessed(tmp_path: Path) -> None:
    original = weight(64, 32, 2, 8, 0, sym=True)
    source = scheme(num_bits=7, group_size=32)
    source["config_groups"]["group_1"] = {"targets": ["re:x"], "weights": {"type": "int", "num_bits": 8}}
    with pytest.raises(CheckpointError, match="make 7-bit codes or 8-bit codes, expected one width"):
        stored(tmp_path, write_compressed_tensors(original), source)


def test_zeros_one_below_the_middle_are_meant_though_another_group_is_symmetric(tmp_path: Path) -> None:
    original = weight(32, 8, 1, 4, 0)
    original.zeros.fill_(7)
    assert_same(stored(tmp_path, write_compressed_tensors(original), scheme(num_bits=4, group_size=32)), original)


def test_the_parts_of_a_layer_may_lie_in_different_files(tmp_path: Path) -> None:
    original = weight(64, 16, 2, 4, 0)
    files = []
    for part, tensor in awq_by_definition(original).items():
        files.append(tmp_path / f"{part}.safetensors")
        save_file({f"l.{part}": tensor}, files[-1])
    config = QuantizeConfig.from_dict({**AWQ, "group_size": 32})
    manifest = as_gptq(read_manifest(files), config)
    spec = resolve_specs(manifest, config)["l"]
    parts = {part: read_tensor(manifest[f"l.{part}"]) for part in spec.shapes}
    assert_same(read_packed(spec, parts, "l").unpack(), original)


def test_zeros_of_fast_gemv_that_no_integer_made_are_refused(tmp_path: Path) -> None:
    parts = load_file(FORMATS / "awq-gemv-fast" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    layer = {part: parts[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
    layer["qzeros"] = layer["qzeros"] * 1.01
    with pytest.raises(CheckpointError, match="zeros that are no integers from 0 to 15"):
        stored(tmp_path, layer, {**AWQ, "version": "gemv_fast", "group_size": 64})


@pytest.mark.parametrize(
    ("bent", "message"),
    [
        ({"bits": 8}, "8 bits"),
        ({"g_idx": torch.arange(64, dtype=torch.int32) % 2}, "act-order"),
        ({"outputs": 12}, "12 outputs"),
    ],
)
def test_what_awq_cannot_hold_is_refused(bent: dict[str, Any], message: str) -> None:
    made = weight(64, bent.get("outputs", 16), 2, bent.get("bits", 4), 0)
    made = QuantizedWeight(made.codes, made.scales, made.zeros, bent.get("g_idx", made.g_idx), made.bits)
    with pytest.raises(ConfigError, match=f"l has {message}.*convert to gptq or compressed-tensors instead"):
        write_awq("l", made)


# -- settings ----------------------------------------------------------------------------------------------------------
