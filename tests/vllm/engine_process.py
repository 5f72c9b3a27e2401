"""Runs vLLM's offline engine for the tests, one model after the other, as :class:`tests.vllm.engine.Engine` asks.

A process of its own: vLLM binds its process to cores and keeps global state. One line of JSON comes in per request,
one goes out per answer; everything else that vLLM prints goes to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own prints must not mix with the answers
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.model_executor.models import registry

    # vLLM looks at each architecture in a process of its own, to keep CUDA out of this one; that is a quarter of a
    # minute of imports each time, for nothing on a CPU. The server's tests leave it as it is.
    registry._run_in_subprocess = lambda function: function()

    engine, loaded = None, None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            wanted = (request["folder"], request["options"])
            if loaded != wanted:
                engine = loaded = None
                gc.collect()
                cleanup_dist_env_and_memory()
                engine = LLM(request["folder"], **request["options"])
                loaded = wanted
            answer: dict[str, Any] = {"outputs": _run(engine, request, SamplingParams)}
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
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    results = engine.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    return [_answer(result) for result in results]


def _answer(result: Any) -> dict[str, Any]:
    rows = []
    for position in (result.prompt_logprobs or [])[1:]:
        rows.append([position[token].logprob for token in range(len(position))])
    return {"tokens": list(result.outputs[0].token_ids), "logprobs": rows}


if __name__ == "__main__":
    main()
