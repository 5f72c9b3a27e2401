"""Runs vLLM's offline engine for the tests, one model after the other, as :class:`tests.vllm.engine.Engine` asks.

A process of its own: vLLM binds its process to cores and keeps global state. One line of JSON comes in per request,
one goes out per answer; everything else that vLLM prints goes to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import traceback
import types
from typing import Any

import torch


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own prints must not mix with the answers
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.model_executor.models import registry

    # vLLM looks at each architecture in a process of its own, to keep CUDA out of this one; that is a quarter of a
    # minute of imports each time, for nothing on a CPU. The server's tests leave it as it is.
    registry._run_in_subprocess = lambda function: function()
    exec(os.environ.get("TEST_RUNS_FIRST", ""), {})

    engine, loaded, left = None, None, 0
    for line in sys.stdin:
        request = json.loads(line)
        try:
            wanted = (request["folder"], request["options"])
            if loaded != wanted:
                engine = loaded = None
                gc.collect()
                cleanup_dist_env_and_memory()
                left = sum(type(each).__name__ in ("FusedWeight", "Experts") for each in gc.get_objects())
                engine = LLM(request["folder"], **request["options"])
                loaded = wanted
            if "reload" in request:
                _reload(engine, **request["reload"])
            before = _drafted(engine, request)
            answer: dict[str, Any] = {
                "outputs": _run(engine, request, SamplingParams),
                "held": _held(engine),
                "left": left,
                "drafted": [now - then for now, then in zip(_drafted(engine, request), before)],
            }
        except BaseException as error:
            traceback.print_exc()
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            answer = {"error": f"{type(error).__name__}: {error}", "cause": f"{type(cause).__name__}: {cause}"}
            engine = loaded = None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(engine: Any, request: dict[str, Any], params: Any) -> list[dict[str, Any]]:
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    if task := request.get("pooling"):
        results = engine.encode(prompts, pooling_task=task, use_tqdm=False)
        return [{"pooled": result.outputs.data.float().tolist()} for result in results]
    lora = None
    if request.get("lora"):
        from vllm.lora.request import LoRARequest

        lora = LoRARequest("adapter", 1, request["lora"])
    sampling = params(
        max_tokens=request["max_tokens"],
        temperature=0,
        detokenize=False,
        ignore_eos=True,
        prompt_logprobs=-1 if request["logprobs"] else None,
    )
    results = engine.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    return [_answer(result) for result in results]


def _drafted(engine: Any, request: dict[str, Any]) -> list[int]:
    """Speculative decoding so far: how many times tokens were drafted, and how many were accepted at each position."""
    if "speculative_config" not in request["options"]:
        return []
    values = {metric.name: metric for metric in engine.get_metrics()}
    drafts = values["vllm:spec_decode_num_drafts"].value
    return [drafts, *values["vllm:spec_decode_num_accepted_tokens_per_pos"].values]


_FOLLOWED = ("gptq_", "torch.nn", "vllm.model_executor")


def _model(engine: Any) -> Any:
    """In this process with one rank only."""
    return engine.llm_engine.model_executor.driver_worker.worker.model_runner.model


def _reload(engine: Any, path: str | None, aborted: tuple[str, ...] = (), repaired: str | None = None) -> None:
    """Load the weights again, after making all that are quantized zero where they can be reached.

    Args:
        aborted: folders that are tried before, each of which fails.
        repaired: a folder that is moved to ``path`` after that.
    """
    if engine.llm_engine.vllm_config.parallel_config.world_size == 1:
        for weight in _weights(engine):
            for name, tensor in weight.named_parameters():
                if name.endswith("scales"):
                    tensor.data.zero_()
    for folder in aborted:
        try:
            engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        except Exception:
            traceback.print_exc()
        else:
            raise AssertionError(f"{folder} was loaded")
    if path is not None and repaired is not None:
        shutil.rmtree(path)
        shutil.move(repaired, path)
    engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
    engine.reset_prefix_cache()


def _weights(engine: Any) -> list[Any]:
    """Of layers that are quantized, as ours keep them."""
    held = [vars(layer).get(name) for layer in _model(engine).modules() for name in ("segments", "w13", "w2")]
    return [weight for weight in held if hasattr(weight, "describe")]


def _held(engine: Any) -> dict[str, int] | None:
    """Bytes of the quantized layers' tensors, and of all tensors that these layers reach, vLLM's records included."""
    if engine.llm_engine.vllm_config.parallel_config.world_size > 1:
        return None
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    layers = [layer for layer in _model(engine).modules() if any(name in vars(layer) for name in ("segments", "w13"))]
    packed = {id(tensor): tensor for weight in _weights(engine) for tensor in weight.parameters()}
    reached: dict[int, Any] = {}
    todo: list[Any] = [*layers, *(LAYERWISE_INFO[layer] for layer in layers if layer in LAYERWISE_INFO)]
    seen: set[int] = set()
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, (str, bytes, int, float, type, type(sys))):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            reached[each.untyped_storage().data_ptr() if not each.is_meta else -1] = each
            todo.append(vars(each))
        elif isinstance(each, dict):
            todo += each.values()
        elif isinstance(each, (list, tuple, set, frozenset)):
            todo += each
        elif isinstance(each, types.FunctionType):
            todo += [cell.cell_contents for cell in each.__closure__ or () if cell.cell_contents is not None]
        elif isinstance(each, types.MethodType):
            todo += [each.__self__, each.__func__]
        elif type(each).__module__.startswith(("gptq_", "torch.nn", "vllm.model_executor")) and hasattr(
            each, "__dict__"
        ):
            todo.append(vars(each))
    ours = [tensor for tensor in reached.values() if not tensor.is_meta]
    return {
        "packed": sum(t.nbytes for t in packed.values()),
        "reached": sum(t.untyped_storage().nbytes() for t in ours),
    }


def _answer(result: Any) -> dict[str, Any]:
    rows = []
    for position in (result.prompt_logprobs or [])[1:]:
        rows.append([position[token].logprob for token in range(len(position))])
    return {"tokens": list(result.outputs[0].token_ids), "logprobs": rows}


if __name__ == "__main__":
    main()
