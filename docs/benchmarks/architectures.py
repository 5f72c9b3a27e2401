"""Which architectures work: a tiny random model of each -> quantize -> save -> ``from_pretrained`` -> the same logits.

    python docs/benchmarks/architectures.py run [--only NAME,...] [--tasks TASK,...]   # writes architectures.json
    python docs/benchmarks/architectures.py table                                      # writes ../models.md from it

Every architecture that transformers has a class for is tried, each in a process of its own; the sizes are those of
small_models.py. It takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import tempfile
import textwrap
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from small_models import NOT_TRIED, REASONS, RULES, TASKS, VOCABULARY, auto_class, build, names_of

HERE = Path(__file__).resolve().parent
RESULTS, TABLE = HERE / "architectures.json", HERE.parent / "models.md"
LIMIT_S = 300
LENGTH = 24
LEAST_SHARE = 0.75  # below which the table has a reason
COLUMNS = ("works", "not built")


def one(name: str, task: str) -> dict[str, Any]:
    """What became of the architecture called ``name``, as JSON values."""
    import torch
    from transformers import AutoConfig

    import gptq_transformers
    from gptq_backend import QuantizeConfig, QuantLinear
    from gptq_transformers.whole_samples import whole_samples

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(3, VOCABULARY - 56, (LENGTH,), generator=generator) for _ in range(8)]

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        inputs = whole_samples(samples[:2], model, "", added=False)
        calls = [each if isinstance(each, dict) else {"input_ids": each[None]} for each in inputs]
        calls = [{key: torch.atleast_2d(value) for key, value in call.items()} for call in calls]
        return torch.cat([model(**call).logits.float().flatten() for call in calls])

    def quantized(model: Any) -> list[QuantLinear]:
        return [module for module in model.modules() if isinstance(module, QuantLinear)]

    try:
        model = build(name, task)
        before = logits(model)
    except Exception as error:
        return {"result": "not built", "note": f"{type(error).__name__}: {error}"}
    weights = language_weights(model)
    with tempfile.TemporaryDirectory() as folder:
        step = "saving the original"
        try:
            model.save_pretrained(f"{folder}/model")
            step = "quantizing"
            config = QuantizeConfig(bits=4, group_size=16, quality="fast", dynamic=RULES.get(name))
            result, _ = gptq_transformers.quantize(f"{folder}/model", config, samples, output=f"{folder}/quantized")
            after = logits(result)
            step = "loading"
            auto = auto_class(task)  # some configurations of parts have a class, but none of an auto class
            known = type(AutoConfig.from_pretrained(f"{folder}/quantized")) in auto._model_mapping
            kind = auto if known else type(model)
            loaded = kind.from_pretrained(f"{folder}/quantized", dtype=torch.float32).eval()
            step = "running"
            found = logits(loaded)
        except Exception as error:
            return {"result": "failed", "note": f"{step}: {type(error).__name__}: {error}"}
    layers = quantized(loaded)
    share = sum(layer.in_features * layer.out_features for layer in layers) / max(1, weights)
    difference = float((found - after).norm() / after.norm())
    same = difference < 1e-4 and len(layers) == len(quantized(result)) > 0
    return {
        "result": "works" if same else "differs",
        "layers": len(layers),
        "share": round(share, 3),
        "difference": difference,
        "change": round(float((after - before).norm() / before.norm()), 3),
        "note": f"with `dynamic={RULES[name]}`" if name in RULES else "",
    }


def language_weights(model: Any) -> int:
    """The weights of linear layers and fused experts in the part of ``model`` that reads, embeddings and heads aside.

    That part is the smallest module with the blocks and the embedding of tokens; of an encoder-decoder it is all.
    """
    from torch import nn

    from gptq_backend.model import find_blocks

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is embedding]
    paths = [f"/{name.replace('.', '/')}" for name in [*find_blocks(model), *names]]
    part = model.get_submodule(os.path.commonpath(paths).strip("/").replace("/", "."))
    aside = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(
        parameter.numel()
        for name, module in part.named_modules()
        if module is not head and not isinstance(module, aside)
        for parameter in module.parameters(recurse=False)
        if id(parameter) not in tied and (parameter.dim() > 2 or (parameter.dim() == 2 and multiplies(name, module)))
    )


def multiplies(name: str, module: Any) -> bool:
    """Whether the 2-D parameters of a module are weights that inputs are multiplied by."""
    from torch import nn

    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or ".experts" in name


def run(only: list[str], tasks: list[str]) -> None:
    """Try all architectures, or those of ``only`` in the place of what was found before."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM  # noqa: F401

    import gptq_transformers  # noqa: F401, like the above once for all processes

    torch.set_num_threads(1)
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found: dict[str, dict[str, Any]] = content.get("tasks", {})
    for task in tasks:
        known = names_of(task)
        entries = {name: entry for name, entry in found.get(task, {}).items() if only and name in known}
        for name in [name for name in only if name in known] or ([] if only else known):
            if name in NOT_TRIED:
                entries[name] = {"result": "not tried", "note": NOT_TRIED[name]}
            else:
                entries[name] = in_a_process(name, task)
            print(f"{task:20} {name:28} {json.dumps(entries[name])[:300]}", flush=True)
        found[task] = dict(sorted(entries.items()))
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        RESULTS.write_text(json.dumps({"versions": versions, "tasks": found}, indent=1) + "\n")
    for task in tasks:
        print(task, dict(Counter(entry["result"] for entry in found[task].values())))


def in_a_process(name: str, task: str) -> dict[str, Any]:
    """:func:`one` in a process of its own, which a crash or a hang ends alone; it starts with everything imported."""
    forked = multiprocessing.get_context("fork")
    receiver, sender = forked.Pipe(duplex=False)
    process = forked.Process(target=lambda: sender.send(quietly(name, task)))
    process.start()
    sender.close()
    try:
        if not receiver.poll(LIMIT_S):
            return {"result": "failed", "note": f"not done after {LIMIT_S} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"result": "failed", "note": f"exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def quietly(name: str, task: str) -> dict[str, Any]:
    logging.disable(logging.WARNING)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return one(name, task)


def table() -> None:
    """Write models.md."""
    content = json.loads(RESULTS.read_text())
    tasks = {task: content["tasks"][task] for task in TASKS}
    version = content["versions"]["transformers"]
    how = (
        f"Which architectures can be quantized? All that transformers {version} has a class for were tried, for four "
        "tasks. *Works* means that a tiny random model was written to a folder, quantized to 4 bits by "
        "`gptq_transformers.quantize`, loaded by the auto class of the task, and gave the same logits as before it was "
        "saved (relative difference below 0.0001)."
    )
    rest = (
        "Layers that stay in 16 bits are routers, heads, convolutions, layers whose weight the model's code reads "
        "instead of calling them, and towers for pictures and sound; `--block-name` adds those. Every run says what "
        "stays."
    )
    lines = ["# Models", "", *textwrap.wrap(how, 120), ""]
    lines += ["| task | works | not built here | other |", "|---|---|---|---|"]
    for task, found in tasks.items():
        counts = Counter(entry["result"] for entry in found.values())
        other = ", ".join(f"{count} {result}" for result, count in counts.items() if result not in COLUMNS)
        lines.append(f"| [{task}](#{task}) | {counts['works']} | {counts['not built']} | {other} |")
    lines += [
        "",
        "    python docs/benchmarks/architectures.py run    # writes docs/benchmarks/architectures.json, some minutes",
        "    python docs/benchmarks/architectures.py table  # writes this page from it",
        "",
        "- *layers*: how many are quantized.",
        "- *share*: their part of the weights of linear layers and experts in the part of the model that reads.",
        "- *reload*: relative difference of the logits before saving and after loading.",
        "- The last column has the result where it is not *works*, settings that the run needed, and the reason for a",
        f"  share below {LEAST_SHARE:.0%}.",
        "",
        *textwrap.wrap(rest, 120),
    ]
    for task, found in tasks.items():
        lines += ["", f"## {task}", "", "| architecture | layers | share | reload | |", "|---|---|---|---|---|"]
        lines += [row(name, entry) for name, entry in found.items()]
    TABLE.write_text("\n".join(lines) + "\n")


def row(name: str, entry: dict[str, Any]) -> str:
    """A line of a table."""
    share = f"{entry['share']:.0%}" if "share" in entry else ""
    reload = f"{entry['difference']:.0e}" if "difference" in entry else ""
    note = entry["note"] if entry["result"] == "works" else f"{entry['result']}: {entry['note']}"
    if entry.get("share", 1) < LEAST_SHARE:
        note = "; ".join(filter(None, (note, REASONS.get(name, "no reason known"))))
    note = " ".join(note.replace("|", "/").split())
    return f"| {name} | {entry.get('layers', '')} | {share} | {reload} | {note[:200]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--only", default="", help="names of architectures, with commas between")
    parser.add_argument("--tasks", default=",".join(TASKS))
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.what == "run":
        run([name for name in arguments.only.split(",") if name], arguments.tasks.split(","))
    else:
        table()


if __name__ == "__main__":
    main()
