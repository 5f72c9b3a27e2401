"""In which format will the file be? As the settings say, or in planes, where a layer has codes of 5 to 7 bits."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from ..config import FORMATS, PLANAR_ONLY_BITS, QuantizeConfig
from ..errors import ConfigError
from ..format.stored_tensors import check_planes

logger = logging.getLogger(__name__)

_PLANES = next(name for name, known in FORMATS.items() if {*PLANAR_ONLY_BITS} <= {*known.bits})
_DEFAULT = QuantizeConfig.checkpoint_format  # which nobody may have asked for


def file_format(widths: Mapping[str, int], config: QuantizeConfig) -> str:
    """The ``checkpoint_format`` of a file whose layers have codes of so many bits, by name.

    One layer that only planes can hold makes that the format of the whole file, since a file has one.

    Raises:
        ConfigError: the settings ask for another format than the default one, which cannot hold a layer.
    """
    if (name := _needs_planes(widths, config)) is None:
        return config.checkpoint_format
    if config.checkpoint_format != _DEFAULT:
        raise ConfigError(
            f"checkpoint_format={config.checkpoint_format!r} cannot hold {name}, which shall have {widths[name]} bits, "
            f"expected one of {FORMATS[config.checkpoint_format].bits}; choose {_PLANES!r} (--format {_PLANES}), or "
            "another width"
        )
    return _PLANES


def tell_of_format(widths: Mapping[str, int], config: QuantizeConfig) -> None:
    """Say where :func:`file_format` is another than in the settings."""
    if (name := _needs_planes(widths, config)) is not None:
        logger.warning(
            "checkpoint_format becomes %s, since %s has %d bits; GPTQModel 7.7 and this package read it",
            _PLANES, name, widths[name],
        )  # fmt: skip


def check_layer(name: str, shape: Sequence[int], own: QuantizeConfig, common: QuantizeConfig) -> None:
    """Raises ConfigError for a rule that would give a layer a format of its own (readers know one of a checkpoint), and
    where planes cannot hold a layer.
    """
    for key in ("checkpoint_format", "pack_dtype"):
        if getattr(own, key) != getattr(common, key):
            raise ConfigError(
                f"dynamic gives {name} {key}={getattr(own, key)!r}, but a checkpoint has one: {getattr(common, key)!r}"
            )
    instead = "use 8 bits, for 3 bits 'gptq_v2', or skip the layer with a dynamic rule"
    check_planes(name, shape, own.bits, common.checkpoint_format, instead)


def _needs_planes(widths: Mapping[str, int], config: QuantizeConfig) -> str | None:
    """The first layer that the settings' format cannot hold."""
    return next((name for name, bits in widths.items() if bits not in FORMATS[config.checkpoint_format].bits), None)
