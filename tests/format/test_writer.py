"""A checkpoint folder exists whole or not at all."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gptq_backend import CheckpointError, QuantizeConfig, quantize_model
from gptq_backend.format.files import checkpoint_files, read_settings
from gptq_backend.format.headers import read_manifest, read_tensor
from gptq_backend.format.layer_specs import resolve_specs
from gptq_backend.format.writer import write_checkpoint
from gptq_backend.output_folder import atomic_folder, check_output


def leftovers(parent):
    return sorted(path.name for path in parent.iterdir())


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_failure_leaves_no_trace(tmp_path, error):
    with pytest.raises(type(error)), atomic_folder(tmp_path / "new" / "parents" / "out") as folder:
        (folder / "half").write_text("written")
        raise error
    assert leftovers(tmp_path) == []


def test_failure_keeps_what_was_to_be_replaced(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "model").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True):
        raise RuntimeError("boom")
    assert (target / "model").read_text() == "old"
    assert leftovers(tmp_path) == ["out"]


def test_overwriting_leaves_nothing_of_the_old_folder(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("old")
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "fresh").write_text("new")
    assert leftovers(target) == ["fresh"]
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize(("mask", "folder_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_others_can_read_what_was_written_as_the_umask_lets_them(tmp_path, mask, folder_mode, file_mode):
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            save_file({"x": torch.ones(1)}, folder / "model.safetensors")
            (folder / "model.safetensors").chmod(0o600)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder_mode
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == file_mode


def test_an_existing_model_is_not_overwritten_by_accident(tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        check_output(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        check_output(tmp_path / "model.safetensors")
    check_output(tmp_path / "new")


def test_a_mount_point_is_refused_before_the_work_and_not_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    (tmp_path / "mounted").mkdir()
    with pytest.raises(CheckpointError, match="mount point"):
        check_output(tmp_path / "mounted")
    check_output(tmp_path / "mounted" / "inside")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("No space left on device (os error 28)"),  # of tokenizers
    ],
)
def test_a_full_disk_gets_one_sentence(tmp_path, error):
    with pytest.raises(CheckpointError, match="no space left"), atomic_folder(tmp_path / "out"):
        raise error
    assert leftovers(tmp_path) == []


def test_a_really_full_disk_leaves_nothing(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(CheckpointError, match="no space left"):
            write_checkpoint({"w": torch.zeros(100_000)}, tmp_path / "out", QuantizeConfig())
        assert leftovers(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_shards_read_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 40)) for _ in range(3))
    config = QuantizeConfig(bits=3, group_size=16)
    quantize_model(model, config)
    state = model.state_dict()
    write_checkpoint(state, tmp_path / "out", config, {"model_type": "none"}, max_shard_bytes=2_000)
    files = checkpoint_files(tmp_path / "out")
    assert len(files) > 1
    manifest = read_manifest(files)
    assert set(manifest) == set(state)
    for name, tensor in state.items():
        assert torch.equal(read_tensor(manifest[name]), tensor)
    assert QuantizeConfig.from_dict(read_settings(tmp_path / "out")).to_dict() == config.to_dict()
    specs = resolve_specs(manifest, config)
    assert {spec.bits for spec in specs.values()} == {3}
    assert len(specs) == 6


def test_shared_tensors_are_written_once(tmp_path):
    weight = torch.randn(8, 8)
    write_checkpoint({"embed": weight, "head": weight}, tmp_path / "out", QuantizeConfig())
    assert set(read_manifest(checkpoint_files(tmp_path / "out"))) == {"embed"}
