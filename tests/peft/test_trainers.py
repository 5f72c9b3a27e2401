"""The trainers that people use: accelerate and transformers' with two processes as with one, and trl's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerFast

from tests.transformers.checkpoints import VERSION_4, distance, load, logits

if VERSION_4:
    pytest.skip("the accelerate that is installed wants another huggingface_hub", allow_module_level=True)

from tests.peft import distributed_process
from tests.peft.distributed_process import WAYS

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def two_processes(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes found, and the adapters that they saved."""
    out = tmp_path_factory.mktemp("two")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", distributed_process.__file__]
    done = subprocess.run(
        [sys.executable, *command, str(checkpoint()), str(out), *WAYS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("way", ["accelerate", "FSDP2", "Trainer"])
def test_two_processes_give_the_losses_and_the_adapter_of_one(
    way: str, two_processes: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    found = json.loads((two_processes / "losses.json").read_text())[way]
    expected = WAYS["Trainer" if way == "Trainer" else "accelerate"](str(checkpoint()), tmp_path)
    assert len(found) == distributed_process.STEPS
    assert found == pytest.approx(expected, abs=1e-3)
    folders = tmp_path, two_processes / way
    one, two = (logits(PeftModel.from_pretrained(load(checkpoint()), folder).eval()) for folder in folders)
    assert distance(two, one) < 1e-3
    assert distance(one, logits(load(checkpoint()))) > 0.01


def test_state_dicts_under_fsdp2_bring_back_an_adapter(two_processes: Path) -> None:
    found = json.loads((two_processes / "losses.json").read_text())["state dicts"]
    assert found.pop("unprepared").startswith("model.layers.0.self_attn.q_proj: a quantized layer was sharded over")
    assert found == dict.fromkeys(("shown", "sharded", "from files", "full", "adapter", "peft's"), True)


def test_fsdp1_refuses_integers(two_processes: Path) -> None:
    assert json.loads((two_processes / "losses.json").read_text())["FSDP1"] == "Cannot flatten integer dtype tensors"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    built = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=built, **special)


def options(folder: Path, **more: Any) -> dict[str, Any]:
    shared = {"max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
    return {"output_dir": str(folder), "max_length": 32, **shared, **quiet, **more}


def trained(run: Any) -> list[float]:
    run.train()
    return [each["loss"] for each in run.state.log_history if "loss" in each]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_trls_supervised_trainer_lowers_the_loss(
    checkpointing: bool, checkpoint: Callable[..., Path], tokenizer: Any, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    run = trl.SFTTrainer(
        model=load(checkpoint()),
        args=trl.SFTConfig(**options(tmp_path, gradient_checkpointing=checkpointing)),
        train_dataset=Dataset.from_dict({"text": ["the quick brown fox jumps over the lazy dog"] * 10}),
        processing_class=tokenizer,
        peft_config=LORA,
    )
    first, *_, last = trained(run)
    assert last < first - 0.1
    run.save_model(str(tmp_path / "adapter"))
    expected = logits(run.model.eval())
    again = PeftModel.from_pretrained(load(checkpoint()), tmp_path / "adapter").eval()
    assert distance(logits(again), expected) < 1e-6


def test_trls_preference_trainer_starts_at_the_base_and_lowers_the_loss(
    checkpoint: Callable[..., Path], tokenizer: Any, tmp_path: Path
) -> None:
    """Its reference is the model without its adapter: at first both agree, and the loss is log 2."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = {"prompt": ["the"] * 10, "chosen": [" quick fox"] * 10, "rejected": [" slow dog"] * 10}
    run = trl.DPOTrainer(
        model=load(checkpoint()),
        args=trl.DPOConfig(**options(tmp_path)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=LORA,
    )
    first, *_, last = trained(run)
    assert first == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)
    assert last < first - 0.1
