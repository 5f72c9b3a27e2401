"""The real vLLM for the tests: offline in a child process, and as an OpenAI-compatible server on loopback."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "quantization": "gptq",
    "dtype": "bfloat16",
    "max_model_len": 128,
    "max_num_batched_tokens": 256,  # small, since vLLM warms up with as many
    "max_num_seqs": 16,
    "max_logprobs": -1,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
}


class EngineError(Exception):
    """vLLM refused a model; the message is that of the error at the root."""


def environment(cache: Path, **changes: str) -> dict[str, str]:
    """Of a process that runs vLLM: small caches, one thread, nothing from the network."""
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **changes,
    }


class Engine:
    """Offline ``LLM(...)``, models one after the other in one process, so that importing vLLM is paid for once.

    Args:
        log: file for what the process prints.
        cache: vLLM's folder for compiled graphs.
        ranks: tensor-parallel size. With one, all of vLLM is in that one process; else each rank has its own.
        variables: environment variables.
    """

    def __init__(self, log: Path, cache: Path, ranks: int = 1, **variables: str) -> None:
        self.log, self.ranks, self._options = log, ranks, dict(OPTIONS)
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if ranks == 1:
            self._options["distributed_executor_backend"] = "uni"
        else:
            variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(i) for i in range(ranks)))
            self._options["tensor_parallel_size"] = ranks
        self._environment = environment(cache, **variables)
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("engine_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("ab"),
            env=self._environment,
            text=True,
            start_new_session=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self._process, self._answers), daemon=True).start()

    def logprobs(self, folder: Path | str, ids: Sequence[int] | Tensor, **kwargs: Any) -> Tensor:
        """[len(ids) - 1, vocabulary] log-probabilities of the token after each prefix of the prompt."""
        rows = self.run(folder, [ids], logprobs=True, **kwargs)[0]["logprobs"]
        return torch.tensor(rows)

    def tokens(self, folder: Path, prompts: Sequence[Sequence[int]], count: int, **kwargs: Any) -> list[list[int]]:
        """Greedy continuations."""
        return [output["tokens"] for output in self.run(folder, prompts, max_tokens=count, **kwargs)]

    def pooled(self, folder: Path, ids: Sequence[int] | Tensor, task: str, **kwargs: Any) -> Tensor:
        """What ``LLM(runner="pooling")`` makes of a prompt: ``task`` is "embed" or "classify"."""
        return torch.tensor(self.run(folder, [ids], pooling=task, runner="pooling", **kwargs)[0]["pooled"])

    def run(
        self,
        folder: Path | str,
        prompts: Sequence[Any],
        max_tokens: int = 1,
        logprobs: bool = False,
        lora: Path | None = None,
        pooling: str | None = None,
        reload: dict[str, Any] | None = None,
        seconds: float = 800,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Load ``folder``, or what has this name in a hub, unless it is, and run ``prompts`` through it.

        Raises:
            EngineError: with the root cause, if vLLM refuses.
        """
        request = {
            "folder": str(folder),
            "options": {**self._options, **options},
            "prompts": [torch.as_tensor(ids).flatten().tolist() for ids in prompts],
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "lora": None if lora is None else str(lora),
            "pooling": pooling,
        }
        if reload is not None:
            request["reload"] = reload
        if self._process.poll() is not None:  # so that one test that took too long does not fail the others
            self._start()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        try:
            answer = json.loads(self._answers.get(timeout=seconds) or "{}")
        except queue.Empty:
            self.close()
            raise AssertionError(f"no answer after {seconds} s; {self._tail()}") from None
        if not answer:
            raise AssertionError(f"the engine's process died; {self._tail()}")
        if "error" in answer:
            raise EngineError(answer["cause"])
        self.held, self.left, self.drafted = answer["held"], answer["left"], answer["drafted"]
        return answer["outputs"]

    def close(self) -> None:
        """End the process and those that it started."""
        stop(self._process)

    def text(self) -> str:
        """All that vLLM printed so far."""
        return self.log.read_text(errors="replace")

    @staticmethod
    def _listen(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        answers.put("")

    def _tail(self) -> str:
        return f"end of {self.log}:\n" + "\n".join(self.text().splitlines()[-30:])


class Server:
    """``vllm serve FOLDER --quantization gptq``, ready to answer.

    Args:
        folder: the checkpoint, or its name in a hub.
        log: file for what it prints.
        cache: vLLM's folder for compiled graphs.
        arguments: more of the command line.
        seconds: to wait for it.
        quantized: whether to ask for ``gptq``.
        variables: environment variables.

    Raises:
        EngineError: it ended by itself; the message is what it printed.
    """

    def __init__(
        self,
        folder: Path | str,
        log: Path,
        cache: Path,
        arguments: Sequence[str] = (),
        seconds: float = 800,
        quantized: bool = True,
        **variables: str,
    ) -> None:
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder)]
        command += ["--quantization", "gptq"] if quantized else []
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "model", *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
            env=environment(cache, **variables),
            start_new_session=True,
        )
        deadline = time.monotonic() + seconds
        while not self.healthy():
            if self.process.poll() is not None:
                raise EngineError(log.read_text(errors="replace"))
            if time.monotonic() > deadline:
                self.close()
                raise AssertionError(f"not ready after {seconds} s:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def healthy(self) -> bool:
        """Whether it answers on /health."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    def post(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """Status and text of the answer to ``body``, or of one without a body, from ``path`` (``/pause``)."""
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data or b"", {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def close(self) -> None:
        """End the server and the processes that it started."""
        stop(self.process)


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session of its own, with everything in it."""
    for sign, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
