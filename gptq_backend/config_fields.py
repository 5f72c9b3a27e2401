"""Which settings there are: name, type, default, meaning and accepted values of each, written once.

Checks, the reading of checkpoints, the command's options and the table in docs/cli.md follow from the fields of
:class:`Settings`. Needs nothing but Python: the command line reads it before anything large is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple


class Format(NamedTuple):
    """How a ``checkpoint_format`` stores zeros and codes."""

    zero_offset: int  # to add to a stored zero
    planar_bits: tuple[int, ...] = ()  # widths of codes that lie in planes; others lie one after another

    @property
    def bits(self) -> tuple[int, ...]:
        """Widths of codes that it has."""
        return tuple(bits for bits in SUPPORTED_BITS if bits in HELD_BITS or bits in self.planar_bits)


HELD_BITS = (2, 3, 4, 8)  # widths of codes in memory: those that kernels multiply
PLANAR_ONLY_BITS = (5, 6, 7)  # which no other format has
SUPPORTED_BITS = tuple(sorted((*HELD_BITS, *PLANAR_ONLY_BITS)))  # in a file
FORMATS = {
    "gptq": Format(zero_offset=1),
    "gptq_v2": Format(zero_offset=0),
    "gptq_p": Format(zero_offset=0, planar_bits=(3, *PLANAR_ONLY_BITS)),
}
EMBED_BITS = tuple(bits for bits in SUPPORTED_BITS if bits >= 4)
PACK_DTYPES = ("int8", "int16", "int32", "int64")


def held_bits(bits: int) -> int:
    """Width in memory of codes of ``bits`` in a file: the next one that kernels multiply, if there is one."""
    return next((held for held in HELD_BITS if held >= bits), bits)


@dataclass(frozen=True)
class Preset:
    """What a ``quality`` stands for; each field is also a setting, which then wins."""

    signed_scales: bool
    search_finalists: int
    refine_sweeps: int
    correct_drift: bool
    row_feedback: bool
    block_epochs: int
    distill_epochs: int

    @property
    def trains(self) -> bool:
        """Whether anything is trained, which takes calibration data to validate on and much time."""
        return bool(self.block_epochs or self.distill_epochs)


QUALITIES = {
    "fast": Preset(
        signed_scales=False,
        search_finalists=1,
        refine_sweeps=0,
        correct_drift=False,
        row_feedback=False,
        block_epochs=0,
        distill_epochs=0,
    ),
    "default": Preset(
        signed_scales=True,
        search_finalists=4,
        refine_sweeps=2,
        correct_drift=True,
        row_feedback=True,
        block_epochs=0,
        distill_epochs=0,
    ),
    "best": Preset(
        signed_scales=True,
        search_finalists=8,
        refine_sweeps=4,
        correct_drift=True,
        row_feedback=True,
        block_epochs=2,
        distill_epochs=2,
    ),
}


class Scope(Enum):
    """Who needs a setting."""

    FILE = auto()  # also a reader of the checkpoint
    LAYER = auto()  # only the quantizer; a dynamic rule can change it for a layer
    RUN = auto()  # only the quantizer, and it is the same for all layers


@dataclass(frozen=True)
class Setting:
    """What is known of a setting beside its name, type and default."""

    help: str
    scope: Scope
    accepts: Callable[[Any], bool]
    expected: str  # what is accepted, for the message about a value that is not
    choices: tuple[Any, ...] = ()
    least: int | None = None  # of an integer
    option: str | None = ""  # of the command, where the default spelling would not do; None if the command has none
    metavar: str | None = None  # what the option's value is called


def _setting(default: Any, *known: Any, **more: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(*known, **more)})


def _flag(default: bool | None, meaning: str, scope: Scope = Scope.LAYER, **more: Any) -> Any:
    choices = (True, False, None) if default is None else (True, False)
    expected = "pass True, False or None" if default is None else "pass True or False"
    return _setting(default, meaning, scope, lambda value: any(value is each for each in choices), expected, **more)


def _choice(default: Any, choices: tuple[Any, ...], meaning: str, scope: Scope = Scope.LAYER, **more: Any) -> Any:
    def accepts(value: Any) -> bool:
        return type(value) is type(default) and value in choices

    return _setting(default, meaning, scope, accepts, f"choose one of {choices}", choices=choices, **more)


def _count(default: int | None, least: int, meaning: str, scope: Scope = Scope.LAYER) -> Any:
    def accepts(value: Any) -> bool:
        return (value is None and default is None) or (type(value) is int and value >= least)

    expected = f"pass an integer of at least {least}" + " or None" * (default is None)
    return _setting(default, meaning, scope, accepts, expected, least=least)


def _is_group_size(value: Any) -> bool:
    return type(value) is int and (value == -1 or value > 0)


def _are_names(value: Any) -> bool:
    """A name, names, or lists of names, as the three generations of tools have them."""
    lists = value if isinstance(value, list | tuple) else [value]
    inside = [name for entry in lists for name in (entry if isinstance(entry, list | tuple) else [entry])]
    return all(isinstance(name, str) for name in inside)


@dataclass(frozen=True)
class Settings:
    """The fields of :class:`QuantizeConfig`, in the order of the command's help."""

    bits: int = _choice(4, SUPPORTED_BITS, "width of a code: 2 to 8", Scope.FILE)
    group_size: int = _setting(  # one scale and zero each
        128,
        "input channels that share a scale; -1 for all; need not divide in_features",
        Scope.LAYER,
        _is_group_size,
        "use -1 or a positive integer",
    )
    sym: bool = _flag(  # symmetric: the zero is fixed at 2**(bits-1)
        True, "symmetric grid, or one with a free zero", Scope.FILE, option="--sym/--asym"
    )
    desc_act: bool = _flag(  # columns by decreasing Hessian diagonal, and groups follow that order
        False, "act-order, with a real g_idx in the checkpoint", option="--desc-act"
    )
    static_groups: bool = _flag(
        False, "fit all grids before the column loop; with --desc-act, g_idx stays trivial", option="--static-groups"
    )
    act_group_aware: bool | None = _flag(  # arXiv 2505.14638: groups by the Hessian diagonal, and columns inside each
        None, "act-order by whole groups, g_idx stays trivial; default: on, unless --desc-act or --static-groups"
    )
    damp_percent: float = _setting(  # see hessian.damping
        0.15,
        "damping, as a share of the median of the Hessian's diagonal; half of in_features / tokens is added",
        Scope.LAYER,
        lambda value: type(value) in (int, float) and 0 < value < 1,
        "pass a number between 0 and 1",
    )
    true_sequential: bool = _flag(True, "each layer sees inputs from the quantized layers of its own block", Scope.RUN)
    quality: str = _choice(
        "default",
        tuple(QUALITIES),
        "work to put into accuracy; fast: GPTQ with a short scale search; default: what lowers errors at "
        "little cost; best: also trains towards the original. Fills in --signed-scales and the next six where they "
        "are not given",
    )
    token_weights: bool = _flag(  # see token_weights.Sensitivity
        True, "before attention, count each token by what an error in a layer's output there changes", Scope.RUN
    )
    scale_search: bool = _flag(True, "search each scale for the least error instead of min-max")
    signed_scales: bool | None = _flag(
        None,
        "a wider search, also of negative scales (asymmetric: of neighbouring zeros); off for readers that insist on "
        "positive ones",
    )
    search_finalists: int | None = _count(None, 1, "candidate scales that are tried with error feedback")
    refine_sweeps: int | None = _count(None, 0, "refinements of scales and codes after the column loop")
    correct_drift: bool | None = _flag(  # see drift.make_up
        None,
        "aim each layer at what the original model computes at its place, so that it makes up for the layers before",
        Scope.RUN,
    )
    row_feedback: bool | None = _flag(  # see row_feedback.in_turns
        None,
        "before attention, let output channels that are rounded later undo a part of the earlier ones' errors; needs "
        "--token-weights",
        Scope.RUN,
    )
    block_epochs: int | None = _count(
        None, 0, "passes over the calibration data in which each block's scales and norms are trained", Scope.RUN
    )
    distill_epochs: int | None = _count(
        None, 0, "passes in which those of the whole model are trained, at the end", Scope.RUN
    )
    lm_head: bool = _flag(False, "also quantize the output embedding", Scope.RUN, option="--lm-head")
    embed_bits: int | None = _setting(
        None,
        "quantize the input embedding to 4 to 8 bits, and with it an output embedding that is the same weight",
        Scope.RUN,
        lambda value: value is None or (type(value) is int and value in EMBED_BITS),
        f"choose one of {EMBED_BITS}, or None to leave it in 16 bits",
    )
    embed_group_size: int | None = _setting(
        None,
        "--group-size of a quantized embedding; -1: one scale for a token, where the head is tied to it",
        Scope.RUN,
        lambda value: value is None or _is_group_size(value),
        "use -1, a positive integer, or None for that of the layers",
    )
    keep_edge_blocks: int = _count(0, 0, "leave so many first and as many last blocks in 16 bits", Scope.RUN)
    dynamic: Mapping[str, Mapping[str, Any]] | None = _setting(  # matched with re.match
        None,
        'per-module rules: {"regex": {"bits": 8}, "-:regex": {}}; -: skips, the first match wins',
        Scope.FILE,
        lambda value: value is None or isinstance(value, Mapping),
        "pass a mapping of regular expressions to settings, or None",
        metavar="JSON",
    )
    checkpoint_format: str = _choice(
        "gptq",
        tuple(FORMATS),
        "how zeros and codes are stored; codes of 5 to 7 bits make it gptq_p",
        Scope.FILE,
        option="--format",
    )
    pack_dtype: str = _choice("int32", PACK_DTYPES, "integer type of qweight in the file", option=None)
    modules_in_block_to_quantize: tuple[str, ...] | None = _setting(  # lists of lists are flattened
        None,
        "names of layers relative to a block; others stay in 16 bits",
        Scope.RUN,
        lambda value: value is None or _are_names(value),
        "pass a list of names or None",
        option=None,
    )
