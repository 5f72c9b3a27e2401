"""How fast does llama.cpp generate, by its own benchmark: a program that the user has, beside our rows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_backend import GPTQError

NAME, PROGRAM = "llama.cpp", "llama-batched-bench"


class LlamaCpp:
    """Runs ``llama-batched-bench`` of llama.cpp on a GGUF file, on as many threads as torch has.

    Args:
        option: ``llama.cpp=PROGRAM``; the program, or a folder that holds it.
        model: the GGUF file; usually the same model as ours.

    Raises:
        GPTQError: another name, or no such program or file.
    """

    def __init__(self, option: str, model: str | None) -> None:
        name, _, place = option.partition("=")
        if name != NAME or not place:
            raise GPTQError(f"--peer {option}, expected {NAME}=PROGRAM with the path of its {PROGRAM}")
        program = Path(place) / PROGRAM if Path(place).is_dir() else Path(place)
        found = shutil.which(str(program.absolute())) or shutil.which(str(program))  # the second looks in PATH
        if found is None:
            raise GPTQError(
                f"--peer {option}, but {program} is no program; build {PROGRAM} of llama.cpp, or download it"
            )
        if model is None or not Path(model).is_file():
            given = "none is given" if model is None else f"{model} is no file"
            raise GPTQError(f"--peer {option} needs --peer-model FILE.gguf, but {given}")
        self._program, self._model = found, model
        self.name = f"{NAME} {Path(model).name}"
        self.facts: dict[str, Any] = {"quantized": None, "compiled": False, "dtype": "gguf"}
        self.prefill: list[float] = []
        self.decode: list[float] = []

    def generate(self, prompt: Tensor, new_tokens: int) -> list[float]:
        """The time before the prompt, after its last token, and after ``new_tokens - 1`` further ones.

        Args:
            prompt: int [B, T]; the program makes up its own tokens, as many.
        """
        batch, length = prompt.shape
        numbers = {
            "-c": batch * (length + new_tokens),
            "-npp": length,
            "-ntg": new_tokens - 1,
            "-npl": batch,
            "-t": torch.get_num_threads(),
            "-tb": torch.get_num_threads(),
        }
        command = [self._program, "-m", self._model, *(str(each) for pair in numbers.items() for each in pair)]
        command += ["--output-format", "jsonl"]
        # Threads that are pinned by variables of OpenMP, as ours may be, would all end up on one core.
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or len(found) != 1:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise GPTQError(
                f"{' '.join(command)} ended with {done.returncode} and {len(found)} results; it said: {said}"
            )
        return [0.0, found[0]["t_pp"], found[0]["t_pp"] + found[0]["t_tg"]]
