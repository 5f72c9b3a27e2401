"""The model that a checkpoint's config.json describes, without weights, and what can be said before it is built.

How much time and memory building takes depends on what config.json claims, which anyone may have written. So it is
checked against the tensors that the files really have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_backend import CheckpointError
from gptq_backend.format import Manifest, read_json

from ..errors import first_line

# Settings that a model repeats modules by, in the spelling of any architecture.
_REPEATS = re.compile(r"(^|_)(n|num)_\w*?(layers?|blocks?|experts?)$|^depth$")
_MAX_EXPERTS = 128**2  # of one layer, as Doge has in a table; fused ones are a single tensor


class UnknownModel(Exception):
    """No class of the running transformers fits: custom code, or an architecture that is newer."""


def check_size(config: Mapping[str, Any], manifest: Manifest) -> None:
    """Refuse a config.json that claims more layers than there are tensors.

    Raises:
        CheckpointError: with the setting.
    """
    for key, value in _integers(config):
        if not _REPEATS.search(key):
            continue
        most = max(len(manifest), _MAX_EXPERTS) if "expert" in key else len(manifest)
        if value > most:
            raise CheckpointError(
                f"config.json says {key}={value}, but the files hold only {len(manifest)} tensors; config.json and the "
                "weights belong to different models: fetch both again"
            )


def build_skeleton(folder: Path, manifest: Manifest) -> nn.Module:
    """The model on the meta device, of the class that config.json names.

    No code of the folder is run.

    Raises:
        CheckpointError: config.json is missing or cannot be used. UnknownModel: this transformers has no class for it.
    """
    # Modelling code, which is not there yet when transformers asks this package for its quantizer.
    from transformers import CONFIG_MAPPING

    from ..model_class import class_to_load, from_config, read_config
    from .newer_config import adopt_newer

    path = folder / "config.json"
    content = read_json(path)
    check_size(content, manifest)
    if str(content.get("model_type")) not in CONFIG_MAPPING:
        raise UnknownModel(f"this transformers has no model_type {content.get('model_type')!r:.60}")
    try:
        config = read_config(folder)
        adopt_newer(config)
        config._attn_implementation = "eager"  # another one may be the name of a kernel on the hub
        config.dtype = torch.float32  # what it says matters only for values
        with torch.device("meta"):
            return from_config(class_to_load(folder, {"config": config}), config)
    except Exception as error:  # whatever a config of any content makes a model's code raise
        raise CheckpointError(
            f"{path} describes no model that transformers can build ({type(error).__name__}: {first_line(error)}); "
            "fetch it again"
        ) from None


def _integers(section: Mapping[str, Any], depth: int = 3) -> Iterator[tuple[str, int]]:
    for key, value in section.items():
        if type(value) is int:
            yield key, value
        elif isinstance(value, Mapping) and depth:
            yield from _integers(value, depth - 1)
