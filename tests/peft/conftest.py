"""Fixtures of the tests with peft: tiny checkpoints, each quantized once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("peft")

from gptq_backend import QuantizeConfig
from tests.transformers.checkpoints import tiny, write


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a tiny model of a family, quantized with these settings; the same call gives the same folder."""
    folders: dict[str, Path] = {}

    def make(family: str = "llama", bits: int = 4, desc_act: bool = False, **changes: object) -> Path:
        key = repr((family, bits, desc_act, sorted(changes.items())))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(family)
            config = QuantizeConfig(bits=bits, group_size=32, desc_act=desc_act, quality="fast")
            write(folders[key], tiny(family, **changes), config)
        return folders[key]

    return make
