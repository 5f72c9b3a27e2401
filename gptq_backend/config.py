"""What to quantize and how: one immutable value, read from every dialect of ``quantization_config``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config_fields import FORMATS as FORMATS
from .config_fields import HELD_BITS as HELD_BITS
from .config_fields import PLANAR_ONLY_BITS as PLANAR_ONLY_BITS
from .config_fields import QUALITIES as QUALITIES
from .config_fields import SUPPORTED_BITS as SUPPORTED_BITS
from .config_fields import Preset, Scope, Setting, Settings
from .dialects import as_flag, as_integer, as_number, canonical
from .errors import ConfigError
from .foreign_settings import gptq_settings
from .name_patterns import Patterns, compiled

_SETTINGS: dict[str, Setting] = {item.name: item.metadata["setting"] for item in dataclasses.fields(Settings)}
# What a quantizing run needs and a reader of its result does not: the tensors tell.
_WRITE_ONLY = {name for name, setting in _SETTINGS.items() if setting.scope is not Scope.FILE}
_WHOLE_RUN = {name for name, setting in _SETTINGS.items() if setting.scope is Scope.RUN}
_CONVERT = {"int": as_integer, "float": as_number, "bool": as_flag}  # what JSON has for these types


@dataclass(frozen=True)
class QuantizeConfig(Settings):
    """Settings of one quantization (:class:`settings.Settings`), also of a checkpoint that is being loaded.

    Args:
        extra: keys of the source dictionary that mean nothing here, and settings of a quantizing run with values that
            are not known here (see :meth:`from_dict`); kept for writing back.

    Raises:
        ConfigError: a value is not supported; the message names the key, the value and the choices.
    """

    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, setting in _SETTINGS.items():
            if not setting.accepts(value := getattr(self, name)):
                hint = " (serialized Marlin cannot be converted back; find the original)" * ("marlin" in str(value))
                raise ConfigError(f"{name}={value!r} is not supported; {setting.expected}{hint}")
        if self.modules_in_block_to_quantize is not None:
            object.__setattr__(self, "modules_in_block_to_quantize", _flat(self.modules_in_block_to_quantize))
        if self.act_group_aware and self.desc_act:
            raise ConfigError("act_group_aware and desc_act exclude each other; set one of them to False")
        for pattern, overrides in (self.dynamic or {}).items():
            if not isinstance(pattern, str) or not isinstance(overrides, Mapping):
                raise ConfigError(f"dynamic: {pattern!r}: {overrides!r} is not a regex with a mapping of settings")
        self._patterns()

    @property
    def group_aware(self) -> bool:
        """``act_group_aware`` with its default resolved."""
        if self.act_group_aware is None:
            return not (self.desc_act or self.static_groups)
        return self.act_group_aware

    @property
    def preset(self) -> Preset:
        """What ``quality`` stands for, with the settings that were given one by one."""
        given = {item.name: getattr(self, item.name) for item in dataclasses.fields(Preset)}
        given = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(QUALITIES[self.quality], **given)

    def for_module(self, name: str) -> QuantizeConfig | None:
        """The settings of module ``name`` after the ``dynamic`` rules, or None when a rule skips it.

        Raises:
            ConfigError: the rule has a value that is not supported, or matching it takes too long.
        """
        number = self._patterns().first(name) if self.dynamic else None
        if self.dynamic is None or number is None:
            return self
        pattern, overrides = list(self.dynamic.items())[number]
        if pattern.startswith("-:"):
            return None
        changes, rest = _known(canonical(overrides))
        changes.pop("dynamic", None)  # a rule has no rules of its own
        changes["extra"] = {**self.extra, **{key: rest[key] for key in rest if key in _WRITE_ONLY}}
        if changes.get("desc_act"):
            changes.setdefault("act_group_aware", False)  # they exclude each other; the rule is what was meant
        try:
            return dataclasses.replace(self, dynamic=None, **changes)
        except ConfigError as error:
            raise ConfigError(f"the dynamic rule {pattern[:60]!r}: {error}") from None

    def unused_rules(self, names: Iterable[str]) -> list[str]:
        """What of ``dynamic`` has no effect, as sentences. names: of all linear layers."""
        found: list[str] = []
        if not self.dynamic:
            return found
        unused = self._patterns().unused(list(names))
        for number, (pattern, overrides) in enumerate(self.dynamic.items()):
            if number in unused:
                found.append(f"the rule {pattern!r} matches the beginning of no layer's full name")
            if whole := sorted(_WHOLE_RUN & canonical(overrides).keys()):
                found.append(f"the rule {pattern!r} sets what is the same for all layers: {', '.join(whole)}")
            if unknown := sorted(map(str, _known(canonical(overrides))[1])):
                found.append(f"the rule {pattern!r} has unknown settings: {', '.join(unknown)}")
        return found

    def _patterns(self) -> Patterns:
        rules = self.dynamic or {}
        return compiled(tuple(rule[2:] if rule[:2] in ("-:", "+:") else rule for rule in rules))

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> QuantizeConfig:
        """Read a ``quantization_config`` or ``quantize_config.json`` dictionary of any known dialect.

        Numbers and booleans may be JSON strings. A checkpoint is not refused for how it was made: values of ``quality``
        and the like that are not known here go to ``extra``, and :meth:`check_quantizer_settings` raises for them.

        Those of AWQ, AutoRound, compressed-tensors and Marlin become GPTQ's (see ``foreign_settings``).

        Raises:
            ConfigError: a format that cannot be read, or a value that a reader needs is not supported.
        """
        known, extra = _known(canonical(gptq_settings(source)))
        return cls(**known, extra=extra)

    def check_quantizer_settings(self) -> None:
        """Raises ConfigError where a setting of a quantizing run has a value that :meth:`from_dict` set aside."""
        dataclasses.replace(self, **{key: self.extra[key] for key in _SETTINGS if key in _WRITE_ONLY & {*self.extra}})

    def to_dict(self) -> dict[str, Any]:
        """The dictionary written as ``quantization_config``: our keys, both spellings of the format, and ``extra``."""
        out: dict[str, Any] = dict(self.extra)
        for item in dataclasses.fields(self):
            if item.name != "extra" and item.name not in self.extra:
                value = getattr(self, item.name)
                out[item.name] = list(value) if isinstance(value, tuple) else value
        out["act_group_aware"] = self.extra.get("act_group_aware", self.group_aware)
        out["dynamic"] = {k: dict(v) for k, v in self.dynamic.items()} if self.dynamic else None
        if modules := self.modules_in_block_to_quantize:
            out["modules_in_block_to_quantize"] = [list(modules)]
        out.update(quant_method="gptq", format=self.checkpoint_format)
        return {key: value for key, value in out.items() if value is not None}


def _flat(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(name for entry in names for name in _flat(entry))


def _known(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split canonical ``values`` into keyword arguments of QuantizeConfig, typed, and the rest as it is."""
    types = {item.name: str(item.type).removesuffix(" | None") for item in dataclasses.fields(Settings)}
    known = {key: _CONVERT.get(types[key], lambda same: same)(value) for key, value in values.items() if key in types}
    known = {key: value for key, value in known.items() if key not in _WRITE_ONLY or _SETTINGS[key].accepts(value)}
    if known.get("desc_act") and known.get("act_group_aware"):
        known["act_group_aware"] = False  # stock GPTQConfig resolves the pair this way too
    return known, {key: value for key, value in values.items() if key not in known and key != "quant_method"}
