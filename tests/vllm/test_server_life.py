"""A server's weights and adapters change while it answers, and a signal ends it as it ends one of a dense model."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import shutil
import signal
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.transformers.checkpoints import PEERS, dense, load, logits
from tests.vllm.engine import Engine, EngineError, Server
from tests.vllm.test_lora import RANK, adapter
from tests.vllm.test_offline import BOUND
from tests.vllm.test_reload import damaged

FIRST, THEN = "llama-4-64-actorder", "llama-dynamic"  # same architecture, other bits
# Longer than the model was made for, so that requests last.
ARGUMENTS = ["--enforce-eager", "--dtype", "bfloat16", "--max-model-len", "1024", "--max-logprobs", "-1"]
LONG = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
LORA = ["--enable-lora", "--max-lora-rank", str(RANK)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    server = Server(PEERS / FIRST, log, cache, [*ARGUMENTS, *LORA], **variables, **LONG)
    yield server
    server.close()


def client(server: Server) -> Any:
    import openai

    # New connections: an idle one may be closed at the moment when it is used again.
    return openai.OpenAI(base_url=server.url, api_key="none", timeout=120, max_retries=0)


def rows(server: Server, ids: Tensor, model: str = "model") -> Tensor:
    """[len(ids) - 1, vocabulary] log-probabilities of the token after each prefix of the prompt."""
    extra = {"prompt_logprobs": -1, "return_tokens_as_token_ids": True}
    answer = client(server).completions.create(model=model, prompt=ids.tolist(), max_tokens=1, extra_body=extra)
    found = [position for position in answer.choices[0].prompt_logprobs if position is not None]
    return torch.tensor([[row[str(token)]["logprob"] for token in range(len(row))] for row in found])


def wanted(name: str) -> tuple[Tensor, Tensor]:
    """A prompt, and the log-probabilities of checkpoint ``name`` like :func:`rows`."""
    expected = load_file(PEERS / f"{name}.expected.safetensors")
    return expected["input_ids"][0], expected["logits"][0].float().log_softmax(-1)[:-1]


def distance(server: Server, name: str) -> float:
    ids, expected = wanted(name)
    return float((rows(server, ids) - expected).abs().mean())


def reload(server: Server, folder: Path) -> tuple[int, str]:
    return server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})


def outcome(server: Server, i: int, tokens: int) -> str:
    """How a request for so many tokens ends: its finish reason, or the name of the error."""
    request = {"prompt": list(range(3 + i % 40, 20 + i % 40)), "max_tokens": tokens, "ignore_eos": True}
    try:
        status, text = server.post("/v1/completions", {"model": "model", "temperature": 0, **request})
    except (OSError, http.client.HTTPException) as error:
        return type(getattr(error, "reason", error)).__name__
    return str(json.loads(text)["choices"][0]["finish_reason"]) if status == 200 else str(status)


@contextlib.contextmanager
def in_flight(server: Server, count: int, tokens: int = 900) -> Iterator[list[concurrent.futures.Future[str]]]:
    """``count`` requests that the server works on, each for so many ``tokens``."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(outcome, server, i, tokens) for i in range(count)]
        deadline = time.monotonic() + 60
        while running(server) < count and time.monotonic() < deadline and not any(each.done() for each in futures):
            time.sleep(0.05)
        yield futures


def running(server: Server) -> int:
    """Requests that the engine has, by the server's own count."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    counts = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith(counts))


# -- weights -----------------------------------------------------------------------------------------------------------


def test_weights_are_loaded_again_between_the_steps_of_requests(server: Server) -> None:
    assert distance(server, FIRST) < BOUND
    with in_flight(server, 30) as answers:
        assert reload(server, PEERS / THEN)[0] == 200
        assert not all(each.done() for each in answers)
    assert {each.result() for each in answers} == {"length"}
    assert distance(server, THEN) < BOUND < distance(server, FIRST)
    assert reload(server, PEERS / FIRST)[0] == 200
    assert distance(server, FIRST) < BOUND


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_weights_are_loaded_again_while_the_server_is_paused(server: Server, mode: str) -> None:
    with in_flight(server, 30) as answers:
        assert server.post(f"/pause?mode={mode}")[0] == 200
        assert reload(server, PEERS / THEN)[0] == 200
        assert server.post("/resume")[0] == 200
    assert {each.result() for each in answers} <= ({"length", "abort"} if mode == "abort" else {"length"})
    assert distance(server, THEN) < BOUND
    assert reload(server, PEERS / FIRST)[0] == 200
    assert distance(server, FIRST) < BOUND


def test_a_paused_server_survives_a_reload_that_fails(server: Server, tmp_path: Path) -> None:
    with in_flight(server, 8) as answers:
        assert server.post("/pause?mode=keep")[0] == 200
        status, text = reload(server, damaged(tmp_path / "bad", FIRST, "at a layer"))
        assert status == 500
        assert "is not in the checkpoint, neither quantized nor dense" in text
        assert reload(server, PEERS / FIRST)[0] == 200
        assert server.post("/resume")[0] == 200
    assert {each.result() for each in answers} == {"length"}
    assert distance(server, FIRST) < BOUND


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_changes_nothing_on_a_cpu(server: Server, level: int) -> None:
    """There vLLM ignores it, and says so."""
    assert server.post(f"/sleep?level={level}")[0] == 200
    assert server.post("/wake_up")[0] == 200
    assert distance(server, FIRST) < BOUND
    assert "sleep mode is not supported on CPU, ignore it." in server.log.read_text()


def test_sleep_mode_is_refused_by_vllm_on_a_cpu(engine: Engine) -> None:
    with pytest.raises(EngineError, match=r"Sleep mode is not supported on current platform\."):
        engine.run(PEERS / FIRST, [[5, 6]], enable_sleep_mode=True)


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_an_adapter_that_the_server_loads_adds_its_product(server: Server, engine: Engine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    merged = logits(adapter(tmp_path / "adapter", load(PEERS / FIRST), ("self_attn", "mlp")), wanted(FIRST)[0][None])
    expected = merged[0].log_softmax(-1)[:-1]
    ids = wanted(FIRST)[0]
    body = {"lora_name": "tuned", "lora_path": str(tmp_path / "adapter")}
    status, text = server.post("/v1/load_lora_adapter", body)
    assert status == 200, text
    found = rows(server, ids, "tuned")
    assert (found - expected).abs().mean() < BOUND < (found - rows(server, ids)).abs().mean()
    assert distance(server, FIRST) < BOUND
    offline = engine.logprobs(PEERS / FIRST, ids, lora=tmp_path / "adapter", enable_lora=True, max_lora_rank=RANK)
    assert (found - offline).abs().mean() < BOUND / 4
    assert reload(server, PEERS / FIRST)[0] == 200  # vLLM drops what it knows of adapters, and loads them again
    assert (rows(server, ids, "tuned") - found).abs().mean() < BOUND / 4
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "tuned"})[0] == 200


# -- the end -----------------------------------------------------------------------------------------------------------

REQUESTS, ROUNDS, PATIENCE = 100, 3, 20


def terminated(folder: Path, log: Path, cache: Path, quantized: bool) -> tuple[int | None, float, Counter[str]]:
    """Of a server that gets SIGTERM: exit status, None if there is none after ``PATIENCE`` seconds; seconds to the end;
    and how many requests end in which way.
    """
    server = Server(folder, log, cache, ARGUMENTS, quantized=quantized, **LONG)
    try:
        with in_flight(server, REQUESTS) as answers:
            before = sum(each.done() for each in answers)
            server.process.send_signal(signal.SIGTERM)
            start, status = time.monotonic(), None
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = server.process.wait(PATIENCE)
            seconds = time.monotonic() - start
            server.close()  # else requests wait for an answer
        assert before < REQUESTS / 2
        return status, seconds, Counter(each.result() for each in answers)
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_signal_ends_the_server_as_it_ends_that_of_a_dense_model(tmp_path: Path, cache: Path) -> None:
    model = dense(load(PEERS / FIRST)).to(torch.bfloat16)
    del model.config.quantization_config
    model.save_pretrained(tmp_path / "dense")
    for file in PEERS.joinpath(FIRST).glob("token*"):
        shutil.copy(file, tmp_path / "dense")
    ends: dict[bool, list[tuple[int | None, float, Counter[str]]]] = {True: [], False: []}
    for i in range(ROUNDS):
        for quantized, folder in ((False, tmp_path / "dense"), (True, PEERS / FIRST)):
            ends[quantized].append(terminated(folder, tmp_path / f"{i}{quantized}.txt", cache, quantized))
            print("quantized" if quantized else "dense", *ends[quantized][-1])  # pytest -rP shows it
    # A race of vLLM decides, for any model: requests are told that they are aborted, or that the engine is dead, or the
    # server waits for as long as they do. None is lost in another way, and an end that comes is as quick.
    assert {status for each in ends.values() for status, _, _ in each} <= {0, None}
    hows = {how for each in ends.values() for *_, counted in each for how in counted}
    assert hows <= {"length", "abort", "500", "RemoteDisconnected"}  # the first was done when the signal came
    quick = {kind: [seconds for status, seconds, _ in each if status == 0] for kind, each in ends.items()}
    assert max(quick[True], default=0) < max(quick[False], default=PATIENCE) + 2  # which is what a busy machine adds
