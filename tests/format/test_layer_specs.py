"""Checkpoint files, settings and headers: what is found, and what is said when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_backend import CheckpointError, ConfigError, QuantizeConfig
from gptq_backend.format.files import checkpoint_files, read_settings
from gptq_backend.format.headers import read_manifest, read_tensor
from gptq_backend.format.layer_specs import quantized_modules, resolve_specs

K, N, GROUP = 64, 40, 32


def layer(
    bits: int = 4, features: int = K, outputs: int = N, group: int = GROUP, dtype: Any = torch.int32
) -> dict[str, Tensor]:
    """Tensors of one layer, by their last name."""
    groups, word = -(-features // group), dtype.itemsize * 8
    return {
        "qweight": torch.zeros(-(-features * bits // word), outputs, dtype=dtype),
        "qzeros": torch.zeros(groups, -(-outputs * bits // word), dtype=dtype),
        "scales": torch.ones(groups, outputs, dtype=torch.float16),
        "g_idx": torch.arange(features, dtype=torch.int32) // group,
    }


def named(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{part}": value for part, value in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor], file: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / file)
    return folder


def specs(folder: Path, config: QuantizeConfig, **kwargs: Any) -> Any:
    return resolve_specs(read_manifest(checkpoint_files(folder)), config, **kwargs)


def read_config(folder: Path) -> QuantizeConfig:
    return QuantizeConfig.from_dict(read_settings(folder))


CONFIG = QuantizeConfig(bits=4, group_size=GROUP)


# -- files -------------------------------------------------------------------------------------------------------------


def test_shards_without_an_index_are_read_together(tmp_path: Path) -> None:
    for i in (1, 2):
        write(tmp_path, {f"a{i}": torch.zeros(1)}, f"model-0000{i}-of-00002.safetensors")
    assert len(checkpoint_files(tmp_path)) == 2
    assert set(read_manifest(checkpoint_files(tmp_path))) == {"a1", "a2"}


def test_a_missing_shard_is_named_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(1)}, "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 of 2 shards .*model-00002-of-00002.safetensors.*fetch"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("gptq_model-4bit-128g.safetensors", {"bits": 4, "group_size": 128}),
        ("gptq_model-4bit--1g.safetensors", {"wbits": 4, "groupsize": -1}),
        ("mine.safetensors", {"model_basename": "mine"}),
        ("mine.bin", {"model_basename": "mine"}),
    ],
)
def test_a_file_with_autogptqs_name_is_found_among_others(file: str, settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"")
    (tmp_path / f"other{Path(file).suffix}").write_bytes(b"")
    assert checkpoint_files(tmp_path, settings) == [tmp_path / file]
    with pytest.raises(CheckpointError, match=r"several weight files .*model_basename"):
        checkpoint_files(tmp_path)


def test_the_only_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(1)}, "llama-7b-4bit.safetensors")
    assert checkpoint_files(tmp_path)[0].name == "llama-7b-4bit.safetensors"


def test_an_empty_folder_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        checkpoint_files(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        checkpoint_files(tmp_path / "nowhere")


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"quantization_config": {"bits": 3, "quant_method": "gptq"}}),
        ("config.json", {"text_config": {"quantization_config": {"bits": 3, "quant_method": "gptq"}}}),
        ("quantize_config.json", {"bits": 3, "group_size": 128}),
        ("quant_config.json", {"w_bit": 3, "q_group_size": 128}),
    ],
)
def test_settings_in_any_known_place_are_found(file: str, content: dict[str, Any], tmp_path: Path) -> None:
    if file != "config.json":
        (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(content))
    assert read_config(tmp_path).bits == 3


def test_config_json_wins(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 8}}))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    assert read_settings(tmp_path) == {"bits": 8}


def test_the_scalars_of_tgi_are_read(tmp_path: Path) -> None:
    write(tmp_path, {"gptq_bits": torch.tensor([8]), "gptq_groupsize": torch.tensor(64), "a": torch.zeros(1)})
    config = read_config(tmp_path)
    assert (config.bits, config.group_size) == (8, 64)


def test_missing_or_broken_settings_are_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no quantization settings.*quantize_config.json"):
        read_config(tmp_path)
    (tmp_path / "quantize_config.json").write_text("{bits: 4")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": "gptq"}')
    with pytest.raises(CheckpointError, match="quantization_config is 'gptq', expected an object"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4, "quant_method": "hqq"}, "hqq"),
        ({"bits": 4, "checkpoint_format": "exotic"}, "exotic"),
        ({"bits": 9}, "bits=9"),
    ],
)
def test_another_kind_of_checkpoint_is_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


# -- headers -----------------------------------------------------------------------------------------------------------


def _truncated(data: bytes) -> bytes:
    return data[:-100]


def _longer(data: bytes) -> bytes:
    return data + b"\0" * 8


def _broken_json(data: bytes) -> bytes:
    return data[:8] + b"#" + data[9:]


def _huge_header(data: bytes) -> bytes:
    return (1 << 60).to_bytes(8, "little") + data[8:]


def _other_shape(data: bytes) -> bytes:
    return data.replace(b'"shape":[8,40]', b'"shape":[9,40]')


@pytest.mark.parametrize(
    "damage", [_truncated, _longer, _broken_json, _huge_header, _other_shape, lambda data: data[:5], lambda data: b""]
)
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = write(tmp_path, named("a", layer())) / "model.safetensors"
    data = damage(file.read_bytes())
    assert data != file.read_bytes()
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors.*fetch it again"):
        read_manifest([file])


def _offsets(change: Callable[[list[list[int]]], Any]) -> Callable[[bytes], bytes]:
    """Give the tensors of a file other places in it; ``change`` edits them in order."""

    def damage(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(sorted((entry["data_offsets"] for key, entry in header.items() if key != "__metadata__")))
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return damage


def _overlap(offsets: list[list[int]]) -> None:
    size = offsets[0][1] - offsets[0][0]
    offsets[0][:] = [offsets[1][0], offsets[1][0] + size]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: (2).to_bytes(8, "little") + b"[]", "invalid JSON"),
        (_offsets(_overlap), "invalid offset for tensor"),
        (_offsets(lambda offsets: offsets[0].append(1)), "invalid length 3"),
        (_offsets(lambda offsets: offsets[0].__setitem__(0, "x")), "invalid type"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(
    damage: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path, named("a", layer())) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"model.safetensors, which has \d+ bytes, .*{message}.*fetch it again"):
        read_manifest([file])


@pytest.mark.parametrize("dynamic", [["-:a"], "a", 3])
def test_rules_that_are_no_mapping_are_refused_in_one_sentence(dynamic: Any) -> None:
    with pytest.raises(ConfigError, match="dynamic"):
        QuantizeConfig.from_dict({"bits": 4, "dynamic": dynamic})


@pytest.mark.parametrize("settings", [{"bits": 8}, {"group_size": 16}])
def test_a_wrong_label_warns_once_for_all_layers(
    settings: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, named("a", layer()) | named("b", layer()) | named("c", layer()))
    found = specs(tmp_path, QuantizeConfig(**{"bits": 4, "group_size": GROUP, **settings}))
    assert {(spec.bits, spec.group_size) for spec in found.values()} == {(4, GROUP)}
    assert [record.getMessage()[:9] for record in caplog.records] == ["3 layers "]
    assert "for example a: 4 bits in 2 groups of 32" in caplog.text


def test_layers_that_are_stored_twice_are_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(
        tmp_path,
        named("a", {**layer(), "weight": torch.zeros(N, K)}) | named("b", {**layer(), "weight": torch.ones(1)}),
    )
    assert set(specs(tmp_path, CONFIG)) == {"a", "b"}
    assert [record.getMessage()[:20] for record in caplog.records] == ["2 layers have both a"]


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return print, ("boom",)

    torch.save({"a": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="plain tensors"):
        read_manifest(checkpoint_files(tmp_path))


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_is_read(new: bool, tmp_path: Path) -> None:
    tensors = named("a", layer())
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    manifest = read_manifest(checkpoint_files(tmp_path))
    assert manifest["a.qweight"].shape == (8, 40)
    assert torch.equal(read_tensor(manifest["a.g_idx"]), tensors["a.g_idx"])


# -- specs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("known", [True, False])
def test_bits_are_taken_from_the_tensors(bits: int, dtype: torch.dtype, known: bool, tmp_path: Path) -> None:
    write(tmp_path, named("a", layer(bits, dtype=dtype)))
    spec = specs(tmp_path, CONFIG, linear_shapes={"a": (K, N)} if known else None)["a"]
    assert (spec.bits, spec.in_features, spec.out_features, spec.groups) == (bits, K, N, 2)
    assert spec.word_dtype == dtype


def test_an_odd_vocabulary_fits(tmp_path: Path) -> None:
    write(tmp_path, named("lm_head", layer(8, outputs=259)))
    spec = specs(tmp_path, QuantizeConfig(group_size=GROUP, dynamic={"lm_head": {"bits": 8}}))["lm_head"]
    assert (spec.bits, spec.out_features, spec.shapes["qzeros"]) == (8, 259, (2, 65))


def test_a_ragged_group_is_read(tmp_path: Path) -> None:
    write(tmp_path, named("a", layer(features=80)))
    spec = specs(tmp_path, CONFIG)["a"]
    assert (spec.in_features, spec.groups, spec.group_size) == (80, 3, 32)


def test_an_empty_g_idx_counts_as_none(tmp_path: Path) -> None:
    tensors = layer()
    write(tmp_path, named("a", {**tensors, "g_idx": torch.empty(0, dtype=torch.int32)}))
    spec = specs(tmp_path, CONFIG)["a"]
    assert (spec.has_g_idx, spec.empty_g_idx, spec.shapes["g_idx"]) == (False, True, (0,))


@pytest.mark.parametrize(
    ("value", "in_model", "kept"), [(0, False, False), (1, False, True), (0, True, True), (0, None, True)]
)
def test_a_spurious_bias_is_dropped_and_a_real_one_kept(
    value: int, in_model: bool | None, kept: bool, tmp_path: Path
) -> None:
    write(tmp_path, named("a", {**layer(), "bias": torch.full((N,), float(value)).half()}))
    biased = None if in_model is None else {"a"} if in_model else set()
    assert specs(tmp_path, CONFIG, linear_shapes={"a": (K, N)}, biased=biased)["a"].has_bias == kept


def _without(part: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(part)


def _set(part: str, value: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({part: value})


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no qzeros": (_without("qzeros"), r"^a: qzeros is missing.*fetch"),
    "no scales": (_without("scales"), r"^a: scales is missing"),
    "no qweight": (_without("qweight"), r"^a: (qzeros|g_idx) is stored without qweight"),
    "qzeros too narrow": (
        _set("qzeros", torch.zeros(2, 4, dtype=torch.int32)),
        r"^a.qzeros has shape \[2, 4\], expected \[2, 5\]",
    ),
    "scales too few": (_set("scales", torch.ones(1, N).half()), r"^a.qzeros has shape \[2, 5\], expected \[1, 5\]"),
    "other outputs": (
        _set("scales", torch.ones(2, 41).half()),
        r"^a: .*40 outputs and 41 columns of scales, the model",
    ),
    "one scale per row": (_set("scales", torch.ones(2, 1).half()), r"another layout than GPTQ's: export it anew"),
    "g_idx too short": (_set("g_idx", torch.zeros(63, dtype=torch.int32)), r"^a: the checkpoint has 63 inputs"),
    "float codes": (_set("qweight", torch.zeros(8, N)), r"^a.qweight is torch.float32, expected"),
    "integer scales": (_set("scales", torch.ones(2, N, dtype=torch.int32)), r"^a.scales is torch.int32"),
    "5 bits": (_set("qweight", torch.zeros(10, N, dtype=torch.int32)), r"^a.qweight: .*5-bit codes, expected 4 bits"),
    "flat scales": (_set("scales", torch.ones(N).half()), r"^a.scales has shape \[40\], expected a non-empty matrix"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_do_not_fit_are_refused(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    tensors = layer()
    change(tensors)
    write(tmp_path, named("a", tensors))
    with pytest.raises(CheckpointError, match=message):
        specs(tmp_path, CONFIG, linear_shapes={"a": (K, N)})


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    write(tmp_path, named("a", layer()))
    with pytest.raises(CheckpointError, match=r"^a: .*40 outputs.*the model 64 inputs and 48"):
        specs(tmp_path, CONFIG, linear_shapes={"a": (K, 48)})
    with pytest.raises(CheckpointError, match=r"^a: the checkpoint has 64 inputs.*the model 160"):
        specs(tmp_path, CONFIG, linear_shapes={"a": (160, N)})


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    write(tmp_path, named("a", layer()))
    with pytest.raises(CheckpointError, match=r"^a: bias is missing"):
        specs(tmp_path, CONFIG, linear_shapes={"a": (K, N)}, biased={"a"})


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_zeros_tell_the_bits_where_nothing_else_does(bits: int, tmp_path: Path) -> None:
    tensors = {part: tensor for part, tensor in layer(bits).items() if part != "g_idx"}
    write(tmp_path, named("a", tensors))
    found = specs(tmp_path, CONFIG)["a"]  # which says 4 bits
    assert (found.bits, found.in_features) == (bits, K)


def test_quantized_modules_are_found_among_other_tensors(tmp_path: Path) -> None:
    write(tmp_path, named("b", layer()) | named("a", layer()) | {"norm.weight": torch.ones(1)})
    manifest = read_manifest(checkpoint_files(tmp_path))
    assert sorted(quantized_modules(manifest)) == ["a", "b"]
    assert load_file(tmp_path / "model.safetensors").keys() == manifest.keys()
