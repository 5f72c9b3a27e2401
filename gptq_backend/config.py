"""What to quantize and how: one immutable value, read from every dialect of ``quantization_config``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .dialects import as_flag, as_integer, as_number, canonical, require_gptq
from .errors import ConfigError
from .patterns import Patterns, compiled
from .settings import FORMATS as FORMATS

SUPPORTED_BITS = (2, 3, 4, 8)
PACK_DTYPES = ("int8", "int16", "int32", "int64")


@dataclass(frozen=True)
class Preset:
    """What a ``quality`` stands for; each field is also a setting of :class:`QuantizeConfig`, which then wins."""

    signed_scales: bool
    search_finalists: int
    refine_sweeps: int
    block_epochs: int
    distill_epochs: int

    @property
    def trains(self) -> bool:
        """Whether anything is trained, which takes calibration data for a judge and much time."""
        return bool(self.block_epochs or self.distill_epochs)


QUALITIES = {
    "fast": Preset(signed_scales=False, search_finalists=1, refine_sweeps=0, block_epochs=0, distill_epochs=0),
    "default": Preset(signed_scales=True, search_finalists=4, refine_sweeps=2, block_epochs=0, distill_epochs=0),
    "best": Preset(signed_scales=True, search_finalists=8, refine_sweeps=4, block_epochs=2, distill_epochs=2),
}

_Rule = tuple[Callable[[Any], bool], str]  # whether a value is accepted, and what is
_FLAG: _Rule = (lambda value: isinstance(value, bool), "pass True or False")
_OPTIONAL_FLAG: _Rule = (lambda value: value is None or isinstance(value, bool), "pass True, False or None")


def _integer_from(least: int, optional: bool = True) -> _Rule:
    expected = f"pass an integer of at least {least}" + " or None" * optional
    return lambda value: (optional and value is None) or (type(value) is int and value >= least), expected


def _are_names(value: Any) -> bool:
    """A name, names, or lists of names, as the three generations of tools have them."""
    lists = value if isinstance(value, list | tuple) else [value]
    inside = [name for entry in lists for name in (entry if isinstance(entry, list | tuple) else [entry])]
    return all(isinstance(name, str) for name in inside)


_READ: dict[str, _Rule] = {"sym": _FLAG}
# What a quantizing run needs and a reader of its result does not: the tensors tell.
_WRITE_ONLY: dict[str, _Rule] = {
    "group_size": (lambda value: type(value) is int and (value == -1 or value > 0), "use -1 or a positive integer"),
    "desc_act": _FLAG,
    "lm_head": _FLAG,
    "pack_dtype": (lambda value: isinstance(value, str) and value in PACK_DTYPES, f"choose one of {PACK_DTYPES}"),
    "modules_in_block_to_quantize": (lambda value: value is None or _are_names(value), "pass a list of names or None"),
    "static_groups": _FLAG,
    "act_group_aware": _OPTIONAL_FLAG,
    "damp_percent": (lambda value: type(value) in (int, float) and 0 < value < 1, "pass a number between 0 and 1"),
    "true_sequential": _FLAG,
    "quality": (lambda value: isinstance(value, str) and value in QUALITIES, f"choose one of {tuple(QUALITIES)}"),
    "scale_search": _FLAG,
    "token_weights": _FLAG,
    "signed_scales": _OPTIONAL_FLAG,
    "search_finalists": _integer_from(1),
    "refine_sweeps": _integer_from(0),
    "block_epochs": _integer_from(0),
    "distill_epochs": _integer_from(0),
    "keep_edge_blocks": _integer_from(0, optional=False),
}

_WHOLE_RUN = {
    "true_sequential",
    "token_weights",
    "block_epochs",
    "distill_epochs",
    "lm_head",
    "keep_edge_blocks",
    "modules_in_block_to_quantize",
}


@dataclass(frozen=True)
class QuantizeConfig:
    """Settings of one quantization; the same value describes a checkpoint that is being loaded.

    Args:
        bits: width of a code: 2, 3, 4 or 8.
        group_size: input channels that share one scale and zero; -1 for one group per output channel.
            Need not divide in_features.
        sym: symmetric grid (zero fixed at ``2**(bits-1)``) instead of one with a free integer zero.
        desc_act: quantize columns in order of decreasing Hessian diagonal (act-order) and let groups follow that
            order, so that the checkpoint carries a real ``g_idx``.
        static_groups: fit every group's grid on the original weight before the column loop. With ``desc_act`` the
            groups stay contiguous and ``g_idx`` stays trivial.
        act_group_aware: order whole groups, and columns inside each, by the Hessian diagonal; ``g_idx`` stays trivial
            (arXiv 2505.14638). ``None`` means "unless ``desc_act`` or ``static_groups``".
        damp_percent: share of the median of the Hessian's diagonal added to it before factoring; with few calibration
            tokens more is added (see :func:`hessian.damping`).
        true_sequential: each layer sees inputs produced by the already quantized layers of its own block.
        quality: "fast" (GPTQ with a short scale search), "default" (what lowers each layer's error at little cost) or
            "best" (also trains towards the original). It fills in those of the next settings that are None.
        scale_search: search each scale for the least Hessian-weighted rounding error instead of min-max.
        token_weights: in the Hessians of layers before attention, count each token by what an error in the layer's
            output there changes (see :class:`sensitivity.Sensitivity`); otherwise all tokens count the same.
        signed_scales: a wider scale search; symmetric grids may have a negative scale, which mirrors the range
            -2**(b-1)..2**(b-1)-1, and asymmetric ones a zero one higher or lower. Plain GPTQ tensors; False is for
            readers that insist on positive scales.
        search_finalists: for so many of the best candidates of the scale search, the group is rounded with error
            feedback before one is chosen.
        refine_sweeps: after the column loop, refit the scales and descend over the codes so often.
        block_epochs: train each block's scales and norms, when its layers are quantized, towards what the original
            blocks pass on, for so many passes over the calibration data (see :func:`blockwise.train_block`).
        distill_epochs: at the end, train scales and norms against the original for so many passes over the calibration
            data (see :func:`distill.distill`); needs the original beside the quantized model.
        lm_head: also quantize the output embedding.
        keep_edge_blocks: leave this many first and as many last blocks in 16 bits.
        dynamic: ``{regex: overrides}``; ``-:`` in front of the regex skips matching modules, ``+:`` or nothing applies
            the overrides. The first key for which ``re.match`` succeeds wins.
        modules_in_block_to_quantize: names relative to a block (lists of lists are flattened); others stay in 16 bits.
        checkpoint_format: ``gptq`` (zeros stored minus one), ``gptq_v2`` (zeros as they are), ``gptq_p`` (v2 zeros,
            3-bit codes in word-aligned planes).
        pack_dtype: integer type of ``qweight`` in the file.
        extra: keys of the source dictionary that mean nothing here, and settings of a quantizing run with values that
            are not known here (see :meth:`from_dict`); kept for writing back.

    Raises:
        ConfigError: a value is not supported; the message names the key, the value and the choices.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = False
    act_group_aware: bool | None = None
    damp_percent: float = 0.15
    true_sequential: bool = True
    quality: str = "default"
    scale_search: bool = True
    token_weights: bool = True
    signed_scales: bool | None = None
    search_finalists: int | None = None
    refine_sweeps: int | None = None
    block_epochs: int | None = None
    distill_epochs: int | None = None
    lm_head: bool = False
    keep_edge_blocks: int = 0
    dynamic: Mapping[str, Mapping[str, Any]] | None = None
    modules_in_block_to_quantize: tuple[str, ...] | None = None
    checkpoint_format: str = "gptq"
    pack_dtype: str = "int32"
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in SUPPORTED_BITS:
            raise ConfigError(f"bits={self.bits!r} is not supported; choose one of {SUPPORTED_BITS}")
        for name, (accepts, expected) in (_READ | _WRITE_ONLY).items():
            if not accepts(value := getattr(self, name)):
                raise ConfigError(f"{name}={value!r} is not supported; {expected}")
        if self.checkpoint_format not in FORMATS:
            hint = " (serialized Marlin cannot be converted back; find the original)" * (
                "marlin" in str(self.checkpoint_format)
            )
            raise ConfigError(
                f"checkpoint_format={self.checkpoint_format!r} is not supported; choose one of {tuple(FORMATS)}{hint}"
            )
        if self.modules_in_block_to_quantize is not None:
            object.__setattr__(self, "modules_in_block_to_quantize", _flat(self.modules_in_block_to_quantize))
        if self.dynamic is not None and not isinstance(self.dynamic, Mapping):
            raise ConfigError(f"dynamic is a {type(self.dynamic).__name__}; expected a mapping of regex to settings")
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
        """What ``quality`` stands for, with the settings that were made one by one."""
        made = {item.name: getattr(self, item.name) for item in dataclasses.fields(Preset)}
        chosen = {name: value for name, value in made.items() if value is not None}
        return dataclasses.replace(QUALITIES[self.quality], **chosen)

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
        return compiled(tuple(map(_strip_sign, self.dynamic or {})))

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> QuantizeConfig:
        """Read a ``quantization_config`` or ``quantize_config.json`` dictionary of any known dialect.

        Numbers and booleans may be JSON strings. A checkpoint is not refused for how it was made: values of ``quality``
        and the like that are not known here go to ``extra``, and :meth:`check_quantizer_settings` raises for them.

        Raises:
            ConfigError: another format, or a value that a reader needs is not supported.
        """
        require_gptq(source)
        known, extra = _known(canonical(source))
        return cls(**known, extra=extra)

    def check_quantizer_settings(self) -> None:
        """Raises ConfigError where a setting of a quantizing run has a value that :meth:`from_dict` set aside."""
        dataclasses.replace(self, **{key: self.extra[key] for key in _WRITE_ONLY if key in self.extra})

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


def _strip_sign(pattern: str) -> str:
    return pattern[2:] if pattern[:2] in ("-:", "+:") else pattern


def _flat(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(name for entry in names for name in _flat(entry))


def _known(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split canonical ``values`` into keyword arguments of QuantizeConfig, typed, and the rest as it is."""
    names = {item.name for item in dataclasses.fields(QuantizeConfig)} - {"extra"}
    known = {key: _TYPED.get(key, _same)(value) for key, value in values.items() if key in names}
    for key, (accepts, _) in _WRITE_ONLY.items():
        if key in known and not accepts(known[key]):
            del known[key]
    if known.get("desc_act") and known.get("act_group_aware"):
        known["act_group_aware"] = False  # stock GPTQConfig resolves the pair this way too
    return known, {key: value for key, value in values.items() if key not in known and key != "quant_method"}


def _same(value: Any) -> Any:
    return value


_TYPED: dict[str, Callable[[Any], Any]] = {
    "bits": as_integer,
    "group_size": as_integer,
    "damp_percent": as_number,
    **{key: as_flag for key, rule in (_READ | _WRITE_ONLY).items() if rule in (_FLAG, _OPTIONAL_FLAG)},
    **dict.fromkeys(("search_finalists", "refine_sweeps", "block_epochs", "distill_epochs"), as_integer),
    "keep_edge_blocks": as_integer,
}
