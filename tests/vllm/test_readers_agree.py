"""The plugin reads settings, files and layers of a damaged checkpoint as ``inspect`` does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gptq_backend import GPTQError
from gptq_backend.format import read_packed
from gptq_backend.format.files import read_settings
from gptq_backend.format.headers import read_tensor
from gptq_cli.checkpoint import read_checkpoint

pytest.importorskip("vllm")

from gptq_vllm.config import GPTQBackendConfig
from gptq_vllm.stored_layers import ExpectedLayer
from tests.transformers.checkpoints import PEERS
from tests.transformers.mutations import mutated
from tests.transformers.test_readers_agree import BASES, inspect

# What the plugin does not look at: dense tensors, and config.json as far as it describes the model.
ELSEWHERE = re.compile(r"^structure|^file: config\.json|(embed_tokens|lm_head|norm)\.weight|\.bias")


def expected(name: str) -> dict[str, ExpectedLayer]:
    """The quantized layers of a checkpoint as vLLM's model of it would announce them."""
    return {
        layer.name: ExpectedLayer(layer.spec.in_features, layer.spec.out_features, layer.spec.has_bias)
        for layer in read_checkpoint(PEERS / name).layers
    }


def read_as_the_plugin(folder: Path, wanted: dict[str, ExpectedLayer]) -> str:
    """What is wrong, or nothing."""
    try:
        config = GPTQBackendConfig.from_config(read_settings(folder))
        config.maybe_update_config(str(folder))
        checkpoint = config.stored.checkpoint
        if any(checkpoint.is_quantized(name) is None for name in wanted):
            return "a layer is missing"
        for name, layer in wanted.items():
            config.stored.expect(name, layer)
        for name, spec in config.stored.specs().items():
            tensors = {part: read_tensor(checkpoint.manifest[f"{name}.{part}"]) for part in spec.shapes}
            read_packed(spec, tensors, name)
    except GPTQError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(110))
def test_the_plugin_and_inspect_agree_on_a_damaged_checkpoint(seed: int, tmp_path: Path) -> None:
    base = BASES[seed % len(BASES)]
    folder = tmp_path / "damaged"
    what = mutated(PEERS / base, folder, seed)
    found, plugin = inspect(folder), read_as_the_plugin(folder, expected(base))
    assert "\n" not in plugin
    if not ELSEWHERE.search(what):
        assert bool(found) == bool(plugin), f"{what}: inspect says {found!r}, the plugin {plugin!r}"
    elif plugin:
        assert found, f"{what}: the plugin says {plugin!r}, inspect nothing"


def test_settings_in_other_files_are_read_by_both(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (PEERS / BASES[0]).iterdir():
        (folder / file.name).symlink_to(file)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))
    assert inspect(folder) == read_as_the_plugin(folder, expected(BASES[0])) == ""
