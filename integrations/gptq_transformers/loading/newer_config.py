"""A config.json that transformers 5 wrote, for transformers 4, which would take its own default for what is called
otherwise there and compute something else without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig

from gptq_backend import ConfigError

# What version 4 reads for an entry of version 5's rope_parameters; a model has some of them.
_NAMES = {
    "rope_theta": ("rope_theta", "rotary_emb_base", "global_rope_theta"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    "original_max_position_embeddings": ("original_max_position_embeddings",),
}
_LOCAL_THETA = ("rope_local_base_freq", "local_rope_theta")
_FULL, _SLIDING = "full_attention", "sliding_attention"


def adopt_newer(config: PretrainedConfig) -> None:
    """Give the settings of version 5 the names that version 4 reads, in place; nothing happens in version 5.

    Raises:
        ConfigError: version 4 has no setting for a value.
    """
    if not transformers.__version__.startswith("4."):
        return
    for section in _sections(config):
        rope = vars(section).get("rope_parameters")
        if isinstance(rope, Mapping):
            _adopt_rope(section, rope)
        experts = vars(section).get("num_local_experts")
        if experts is not None and "num_experts" in type(section)().to_dict():
            section.num_experts = experts


def _adopt_rope(section: Any, rope: Mapping[str, Any]) -> None:
    kinds = {kind: value for kind, value in rope.items() if kind.endswith("attention")}
    if kinds:  # one for each kind of attention layer
        rope = kinds.get(_FULL, {})
        local = [name for name in _LOCAL_THETA if hasattr(section, name)]
        sliding = kinds.get(_SLIDING, rope)
        for name in local:
            setattr(section, name, sliding.get("rope_theta", getattr(section, name)))
        same = dict(rope) == dict(sliding)
        if set(kinds) - {_FULL, _SLIDING} or not (same or (local and _kind(sliding) == "default")):
            raise ConfigError(
                f"config.json was written by transformers 5 and has rope_parameters={dict(kinds)}, for which "
                f"{type(section).__name__} of transformers {transformers.__version__} has no settings; install "
                "transformers 5"
            )
    for key, names in _NAMES.items():
        for name in names if key in rope else ():
            if hasattr(section, name):
                setattr(section, name, rope[key])
    apart = {"rope_theta", "partial_rotary_factor"}
    scaling = {key: value for key, value in rope.items() if key not in apart}
    section.rope_scaling = None if _kind(rope) == "default" else scaling


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _sections(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The configuration and those inside it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _sections(value)
