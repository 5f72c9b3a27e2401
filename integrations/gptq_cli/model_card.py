"""The README.md of a checkpoint, which the Hugging Face Hub shows as its card: what it is, how good, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from gptq_backend.locks import write_text
from gptq_transformers.model_class import class_of, predicts_next_token, read_config

from .formatting import duration, megabytes, percent, significant, to_json, with_error
from .report_page import describe, places

NAME = "README.md"
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")  # of the original's card


def write_card(report: Mapping[str, Any], folder: Path, repo: str | None, trust_remote_code: bool) -> Path:
    """Write the card of the checkpoint in ``folder`` into it, whole or not at all.

    Args:
        report: see :func:`report.make_report`.
        repo: name on the hub, which the commands in the card load; None: the folder's name.
        trust_remote_code: let the model's own code say which class loads it.
    """
    config = read_config(folder, trust_remote_code)
    loader = getattr(class_of(config, folder, trust_remote_code), "__name__", "AutoModel")
    reads = predicts_next_token(config, folder)
    name = repo or folder.resolve().name
    template = (resources.files(__package__) / "model_card.md").read_text(encoding="utf-8")
    text = Template(template).substitute(
        report["versions"],
        name=name.rpartition("/")[2],
        original=_original(report["model"]),
        summary=describe(report),
        table="\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in _rows(report).items())]),
        load=_load(name, loader, folder, bool(getattr(config, "auto_map", None))),
        serve=f"    vllm serve {name}\n" if reads else "",
        more="" if report["calibration"] is None else "\nEach layer's error is in `quantize_report.html`.",
        version=report["versions"]["gptq_backend"],
        duration=duration(report["seconds"]),
        settings=to_json(report["settings"]),
    )
    data = _metadata(report["model"], report["settings"]["bits"], reads)
    write_text(folder / NAME, f"---\n{data.to_yaml()}\n---\n\n{text}")
    return folder / NAME


def _metadata(model: str, bits: int, reads: bool) -> ModelCardData:
    """What the hub reads in a card; a local folder's path stays private."""
    try:
        original = ModelCard.load(Path(model) / NAME if Path(model).is_dir() else model).data.to_dict()
    except (OSError, ValueError, HfHubHTTPError):  # it has none, or cannot be asked
        original = {}
    fields = {key: original[key] for key in _INHERITED if key in original}
    if reads:
        fields.setdefault("pipeline_tag", "text-generation")
    if not Path(model).is_dir():
        fields |= {"base_model": model, "base_model_relation": "quantized"}
    return ModelCardData(library_name="transformers", tags=["gptq", f"{bits}-bit"], **fields)


def _original(model: str) -> str:
    """A link for a model of the hub, the name alone of a folder."""
    if Path(model).is_dir():
        return f"`{Path(model).resolve().name}`"
    return f"[{model}](https://huggingface.co/{model})"


def _rows(report: Mapping[str, Any]) -> dict[str, str]:
    found = {"weights on disk": megabytes(report["bytes_after"])}
    if report["bytes_before"]:
        found["weights on disk"] += f" (original {megabytes(report['bytes_before'])})"
    found |= {"quantized layers": str(report["modules"]), "format": f"`{report['settings']['checkpoint_format']}`"}
    if report["kept"]:
        found["stays in 16 bits"] = places(report["kept"])
    if (quality := report["evaluation"]) is not None:
        text = f"{quality['windows']} windows of {quality['seqlen']} tokens that were not calibrated on"
        kld = with_error(quality["kld"], quality["kld_stderr"])
        found["KL divergence from the original"] = f"{kld} nats per token ({text})"
        found["same most likely token"] = percent(quality["top1_agreement"])
        both = significant(quality["perplexity"]), significant(quality["reference_perplexity"])
        found["perplexity there"] = f"{both[0]} (original {both[1]})"
    return found


def _load(name: str, loader: str, folder: Path, own_code: bool) -> str:
    """Python that loads the model and what prepares its inputs."""
    prepared = any((folder / file).is_file() for file in ("processor_config.json", "preprocessor_config.json"))
    kind = "Processor" if prepared else "Tokenizer"
    options = ", trust_remote_code=True" if own_code else ""
    lines = ["# It comes with Python code of its own: read it before you run it."] if own_code else []
    lines += [f"from transformers import {loader}, Auto{kind}", ""]
    lines.append(f'model = {loader}.from_pretrained("{name}"{options})')
    lines.append(f'{kind.lower()} = Auto{kind}.from_pretrained("{name}"{options})')
    return "\n".join(lines)
