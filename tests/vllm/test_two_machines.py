"""``vllm serve`` on two machines that share one model gives the log-probabilities of one process."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.machines import ADDRESSES, obstacle, two_machines
from tests.transformers.checkpoints import PEERS
from tests.vllm.engine import OPTIONS, Engine, environment
from tests.vllm.test_offline import BOUND, distance

pytestmark = [
    pytest.mark.skipif(obstacle() is not None, reason=f"no machines out of namespaces: {obstacle()}"),
    pytest.mark.slow,
]


def ask(file: Path, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Status and text of a server's answer. It listens on a file, which this network and its own share."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(300)
    connection.sock.connect(str(file))
    headers = {"Content-Type": "application/json"}
    connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def is_ready(file: Path) -> bool:
    """Whether the server answers; before it listens, the file is there and refuses."""
    try:
        return ask(file, "/health")[0] == 200
    except (FileNotFoundError, ConnectionRefusedError):
        return False


def logprobs_of_two(folder: Path, prompt: Tensor, scratch: Path, cache: Path, options: list[str]) -> Tensor:
    """[len(prompt) - 1, vocabulary] from one model on two machines."""
    file, logs = scratch / "api.sock", [scratch / f"{name}.txt" for name in ADDRESSES]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--served-model-name", "model"]
    for name, value in OPTIONS.items():
        if name != "enforce_eager":
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    command += ["--nnodes", "2", "--master-addr", ADDRESSES["first"], "--distributed-executor-backend", "mp", *options]
    with two_machines() as machines:
        processes = []
        for rank, machine in enumerate(machines):
            own = ["--node-rank", str(rank), *(["--headless"] if rank else ["--uds", str(file)])]
            # Without a route to the internet vLLM does not find its own address.
            place = {"VLLM_HOST_IP": ADDRESSES[machine.name], "VLLM_CPU_OMP_THREADS_BIND": str(rank)}
            with logs[rank].open("wb") as log:
                started = machine.popen(
                    [*command, *own], environment(cache, **place), stdout=log, stderr=subprocess.STDOUT
                )
                processes.append(started)
        deadline = time.monotonic() + 800
        while not is_ready(file):
            told = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
            assert all(process.poll() is None for process in processes), told
            assert time.monotonic() < deadline, told
            time.sleep(0.5)
        body = {"model": "model", "prompt": prompt.tolist(), "max_tokens": 1, "prompt_logprobs": -1, "temperature": 0}
        status, text = ask(file, "/v1/completions", body)
    assert status == 200, text
    assert all("Quantized layers by kernel of gptq-backend: " in log.read_text(errors="replace") for log in logs)
    rows = json.loads(text)["choices"][0]["prompt_logprobs"][1:]
    return torch.tensor([[row[str(token)]["logprob"] for token in range(len(row))] for row in rows])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-4-32-sym", ["--tensor-parallel-size", "2", "--enforce-eager"]),
        ("llama-4-64-actorder", ["--pipeline-parallel-size", "2"]),  # vLLM fails at this in eager mode on CPUs
    ],
)
def test_two_machines_give_the_logprobs_of_one(
    engine: Engine, name: str, options: list[str], tmp_path: Path, cache: Path
) -> None:
    expected = load_file(PEERS / f"{name}.expected.safetensors")
    prompt, logits = expected["input_ids"][0], expected["logits"][0]
    together = logprobs_of_two(PEERS / name, prompt, tmp_path, cache, options)
    difference = (together - engine.logprobs(PEERS / name, prompt)).abs().mean()
    print(f"{name} {options}: {distance(together, logits):.4f}, {difference:.4f} from one")
    assert distance(together, logits) < BOUND
    assert difference < BOUND
