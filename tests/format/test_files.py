"""Which files are read, and what an untrusted folder can make a reader do: a clear refusal, in bounded work."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from gptq_backend import CheckpointError
from gptq_backend.format.files import checkpoint_files, read_json, read_settings
from gptq_backend.format.headers import read_manifest, read_tensor

QUANTIZED = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write(folder: Path, *names: str, config: dict[str, Any] | None = None) -> Path:
    """Weight files, each with one tensor that is called like the file; an index of the shards among them."""
    for name in names:
        key = name.partition(".")[0]
        if name.endswith(".safetensors"):
            save_file({key: torch.zeros(3)}, folder / name)
        else:
            torch.save({key: torch.zeros(3)}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def found(folder: Path, settings: dict[str, Any] | None = None) -> list[str]:
    return [path.name for path in checkpoint_files(folder, settings)]


def test_a_single_file_is_read_before_shards_as_transformers_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "model.safetensors", *SHARDS, config=QUANTIZED)
    write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1]})
    assert found(tmp_path) == ["model.safetensors"]
    assert "both model.safetensors and an index" in caplog.text
    (tmp_path / "model.safetensors").unlink()
    assert found(tmp_path) == list(SHARDS)


@pytest.mark.parametrize("config", [QUANTIZED, {}])
def test_the_standard_name_wins_where_transformers_sees_the_settings(config: dict[str, Any], tmp_path: Path) -> None:
    named = "gptq_model-4bit-128g.safetensors"
    write(tmp_path, "pytorch_model.bin", named, config=config)
    expected = "pytorch_model.bin" if config else named
    assert found(tmp_path, {"bits": 4, "group_size": 128}) == [expected]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_shards_by_autogptqs_name_are_found_by_their_own_index(suffix: str, tmp_path: Path) -> None:
    stem = f"gptq_model-4bit-128g{suffix}"
    shards = [f"gptq_model-4bit-128g-0000{i}-of-00002{suffix}" for i in (1, 2)]
    write(tmp_path, *shards, config={})
    write_index(tmp_path, {"a": shards[0], "b": shards[1]}, f"{stem}.index.json")
    assert found(tmp_path, {"bits": "4", "group_size": 128}) == shards


def test_the_file_that_config_json_names_is_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        "model.safetensors",
        "other.safetensors",
        config={**QUANTIZED, "transformers_weights": "other.safetensors"},
    )
    assert found(tmp_path) == ["other.safetensors"]


def test_files_of_trainers_are_no_weights(tmp_path: Path) -> None:
    write(tmp_path, "weights.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "adapter_model.bin")
    assert found(tmp_path) == ["weights.bin"]


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "a\0.safetensors"])
def test_files_outside_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    write_index(folder, {"a": name.replace("/x", f"{tmp_path}/x") if name.startswith("/") else name})
    with pytest.raises(CheckpointError, match=r"index\.json names the file .* outside of the folder"):
        checkpoint_files(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a\0b", "a" * 300, 5, ["x"], {"a": 1}, None])
def test_a_basename_that_is_no_name_finds_nothing(name: Any, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    (folder := tmp_path / "in").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        checkpoint_files(folder, {"model_basename": name})


@pytest.mark.parametrize("weight_map", [[], "x", 5, None, {}, {"a": 5}, {"a": None}, {"a": ["x"]}, {"a": {}}])
def test_an_index_without_names_of_files_is_refused(weight_map: Any, tmp_path: Path) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="has no weight_map from names of tensors to names of files"):
        checkpoint_files(tmp_path)


def test_an_index_of_safetensors_names_no_pickles(tmp_path: Path) -> None:
    write_index(write(tmp_path, "e.bin"), {"a": "e.bin"})
    with pytest.raises(CheckpointError, match=r"names 'e\.bin', expected \*\.safetensors"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin", SHARDS[0]])
def test_pipes_are_refused_instead_of_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    if name == SHARDS[0]:
        write_index(tmp_path, {"a": name})
    with pytest.raises(CheckpointError, match=rf"{name} is a pipe, socket or device, expected a file"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "quantize_config.json"])
def test_folders_and_dangling_links_are_refused_by_name(name: str, tmp_path: Path) -> None:
    read = checkpoint_files if name == "model.safetensors" else read_settings
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"{name} is a folder, expected a file"):
        read(tmp_path)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises((CheckpointError, ValueError), match=rf"{name} cannot be read|has no quantization settings"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1]", "holds a list, expected an object"),
        (b"null", "holds a NoneType, expected an object"),
    ],
)
def test_json_that_cannot_be_used_is_refused_in_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.* {message}") as raised:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(raised.value)


def test_json_of_any_size_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room on the disk
    with pytest.raises(CheckpointError, match="1099511627776 bytes, expected at most"):
        read_json(tmp_path / "config.json")


@given(
    header=st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_a_header_is_read_or_refused(header: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("header") / "model.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with contextlib.suppress(CheckpointError):  # any other error is a fault
        read_manifest([file])


def test_a_pickle_of_a_small_file_makes_no_large_tensor(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"a is a tensor of \[1099511627776\] in a file of"):
        read_manifest([tmp_path / "pytorch_model.bin"])


def test_a_compressed_pickle_is_refused_before_it_grows(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as small,
    ):
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert os.path.getsize(tmp_path / "pytorch_model.bin") < 1 << 16
    with pytest.raises(CheckpointError, match="holds compressed entries"):
        read_manifest([tmp_path / "pytorch_model.bin"])


@pytest.mark.parametrize("content", [{"a": torch.eye(3).to_sparse()}, {5: torch.zeros(1)}])
def test_other_than_plain_tensors_with_names_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected plain tensors with names"):
        read_manifest([tmp_path / "pytorch_model.bin"])


def test_a_file_is_opened_once_for_all_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"a{i}": torch.full((2,), i) for i in range(50)}, tmp_path / "model.safetensors")
    opened = []
    from gptq_backend.format import headers as module

    original = module.safe_open
    monkeypatch.setattr(module, "safe_open", lambda *args, **kwargs: opened.append(args) or original(*args, **kwargs))
    manifest = read_manifest([tmp_path / "model.safetensors"])
    assert [int(read_tensor(manifest[f"a{i}"])[0]) for i in range(50)] == list(range(50))
    assert len(opened) == 1


def test_a_manifest_survives_pickling(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "model.safetensors")
    manifest = read_manifest([tmp_path / "model.safetensors"])
    read_tensor(manifest["a"])
    assert read_tensor(pickle.loads(pickle.dumps(manifest))["a"]).tolist() == [0, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=8), st.booleans())
def test_a_damaged_pickle_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], directory: bool
) -> None:
    file = write(tmp_path_factory.mktemp("pickle"), "model.bin") / "model.bin"
    data = bytearray(file.read_bytes())
    first = data.index(b"PK\1\2") if directory else 0  # the archive's list of entries is a small part of it
    for place, value in flips:
        data[first + place % (len(data) - first)] = value
    file.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        for info in read_manifest([file]).values():
            read_tensor(info)


def test_names_that_are_too_long_for_a_file_are_missing(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": f"{'x' * 5000}.safetensors"})
    with pytest.raises(CheckpointError, match=r"1 of 1 shards named in model\.safetensors\.index\.json are missing"):
        checkpoint_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert found(write(tmp_path, "model.safetensors"), {"model_basename": "\u00fc" * 200}) == ["model.safetensors"]
