"""Options that several commands have, and those that set the fields of ``QuantizeConfig``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import runpy
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is stdout, and nothing else goes there."),
]
Shape = Annotated[list[str] | None, typer.Option(metavar="NxK", help="Output and input features (repeatable).")]
Shapes = Annotated[list[str] | None, typer.Option(metavar="LIST", help="Layers of a model, e.g. llama2-7b, or all.")]
GroupSizes = Annotated[str, typer.Option(metavar="G,...", help="Channels that share a scale; -1 for all.")]
Rows = Annotated[str, typer.Option("--m", metavar="M,...", help="Rows of activations.")]
Device = Annotated[str, typer.Option(help="Where to run, e.g. cpu or cuda:0.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model. Never done unasked.")
]
HeadBits = Annotated[
    int | None, typer.Option(help="Round the head of MODEL to 8 or 4 bits. Default: as it is.", show_default=False)
]
Out = Annotated[str, typer.Argument(metavar="OUT", help="Folder to write; must be new or empty.", show_default=False)]
Samples = Annotated[int, typer.Option(min=1, help="Windows of calibration text, for auto at most.")]
Seqlen = Annotated[int, typer.Option(min=1, help="Tokens per window.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="For the choice of windows.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Windows per forward pass.")]
BlockName = Annotated[
    list[str] | None,
    typer.Option(
        "--block-name", metavar="NAME", help="List of blocks; may be repeated. Default: those that read or write text."
    ),
]
BlockDevice = Annotated[str, typer.Option(help="Where to compute, a block at a time, e.g. cpu or cuda:0.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it holds something.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's.")]

_MAKE_ENUM: Any = Enum  # called with names that type checkers cannot know


def names_in_core(file: str) -> dict[str, Any]:
    """What a file of gptq_backend defines; the package is not imported, which would import torch."""
    package = importlib.util.find_spec("gptq_backend")
    assert package is not None
    assert package.origin is not None
    return runpy.run_path(str(Path(package.origin).with_name(file)))


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``settings`` of a command by an option for each field of ``QuantizeConfig``."""
    options = _setting_options()
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = {option.name: values.pop(option.name) for option in options}
        command(settings={key: getattr(value, "value", value) for key, value in given.items()}, **values)

    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += options if parameter.name == "settings" else [parameter]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _setting_options() -> list[inspect.Parameter]:
    core = names_in_core("config_fields.py")
    found = []
    for item in dataclasses.fields(core["Settings"]):
        setting, default = item.metadata["setting"], item.default
        if setting.option is None:
            continue
        kind: Any = {"int": int, "float": float, "bool": bool}.get(item.type.removesuffix(" | None"), str)
        if isinstance(default, str):
            kind = _MAKE_ENUM(item.name, {choice: choice for choice in setting.choices}, type=str)
            default = kind(default)
        option = typer.Option(
            *([setting.option] if setting.option else []),
            help=f"{setting.help[0].upper()}{setting.help[1:]}.",
            min=setting.least,
            metavar=setting.metavar,
            show_default=by_quality(item.name, core["QUALITIES"]) or True,
        )
        found.append(
            inspect.Parameter(
                item.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=default,
                annotation=Annotated[Optional[kind] if default is None else kind, option],  # noqa: UP045
            )
        )
    return found


def by_quality(name: str, qualities: dict[str, Any]) -> str | None:
    """``fast: 1, default: 4, best: 8`` for a setting that ``quality`` fills in."""
    if not hasattr(qualities["default"], name):
        return None
    shown = {True: "on", False: "off"}
    values = {key: getattr(preset, name) for key, preset in qualities.items()}
    return ", ".join(f"{key}: {shown[v] if isinstance(v, bool) else v}" for key, v in values.items())
