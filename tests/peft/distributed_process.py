"""One of several processes that train the same model in several ways; rank 0 writes the losses of each.

torchrun --nproc-per-node 2 distributed_process.py CHECKPOINT OUT WAY ...
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from gptq_backend import ConfigError, QuantLinear

STEPS, BATCH, RATE = 4, 4, 1e-2


def model_with_adapter(folder: str) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def batches() -> Tensor:
    """int64 [steps, batch, tokens]."""
    return torch.randint(3, 259, (STEPS, BATCH, 24), generator=torch.Generator().manual_seed(7))


def accelerated(folder: str, adapter: Path, sharded: bool = False) -> list[float]:
    """The loop of accelerate's documentation, and the adapter saved at its end."""
    accelerator = Accelerator(cpu=True)
    if sharded:  # accelerate would leave FSDP out on CPUs, without a word
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        accelerator.state.distributed_type = DistributedType.FSDP
    model = model_with_adapter(folder)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    if sharded:
        check_shards(model)
    model.train()
    losses = []
    for batch in batches():
        rows = batch.chunk(accelerator.num_processes)[accelerator.process_index]
        loss = model(input_ids=rows, labels=rows).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    state = accelerator.get_state_dict(model)
    state = {key: each.full_tensor() if hasattr(each, "full_tensor") else each for key, each in state.items()}
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(adapter, state_dict=state)
    return losses


def check_shards(model: nn.Module) -> None:
    """Parameters are cut, packed words too; to ask for those of one layer is refused, where a kernel would crash."""
    assert all(hasattr(each, "device_mesh") for each in model.parameters())
    layer = next(module for module in model.modules() if isinstance(module, QuantLinear))
    with pytest.raises(ConfigError, match=r"is sharded over processes \(FSDP\)"):
        layer.quantized_weight()


def trainer(folder: str, adapter: Path) -> list[float]:
    """transformers' Trainer."""
    processes = PartialState().num_processes
    options = {"max_steps": STEPS, "learning_rate": RATE, "logging_steps": 1, "seed": 3, "disable_tqdm": True}
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH // processes,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        lr_scheduler_type="constant",
        **options,
    )
    rows = [{"input_ids": row, "labels": row} for row in batches().flatten(0, 1)]
    run = Trainer(model_with_adapter(folder), arguments, train_dataset=rows)
    run.train()
    run.save_model(str(adapter))
    return [each["loss"] for each in run.state.log_history if "loss" in each]


FULL = functools.partial(StateDictOptions, full_state_dict=True, cpu_offload=True)
FROM_RANK_0 = functools.partial(FULL, broadcast_from_rank0=True)


def state_dicts(folder: str, adapter: Path) -> dict[str, Any]:
    """Which state dicts of a model under FSDP2 bring back an adapter that was lost, and what they show."""
    model = model_with_adapter(folder)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" in key}
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model(input_ids=batches()[0], labels=batches()[0]).loss.backward()
    model.reshard()
    full, frozen_left_out = (
        get_model_state_dict(model, options=FULL(ignore_frozen_params=only)) for only in (False, True)
    )
    sharded = {key: tensor.clone() for key, tensor in get_model_state_dict(model).items()}
    dcp.save(sharded, checkpoint_id=adapter)
    peft = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    first = torch.distributed.get_rank() == 0
    ways = {
        "sharded": lambda: set_model_state_dict(model, sharded),
        "from files": lambda: dcp.load(get_model_state_dict(model), checkpoint_id=adapter),
        "full": lambda: set_model_state_dict(model, full, options=FROM_RANK_0()),
        "adapter": lambda: set_model_state_dict(model, frozen_left_out, options=FROM_RANK_0(strict=False)),
        "peft's": lambda: set_peft_model_state_dict(model, peft),
    }
    found: dict[str, Any] = {"shown": first and sorted(frozen_left_out) == sorted(expected)}
    for name, bring_back in ways.items():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.zero_()
        bring_back()
        here = {key: each.full_tensor() for key, each in model.named_parameters() if "lora_" in key}
        found[name] = all(torch.equal(here[key], tensor) for key, tensor in expected.items())
    layer = next(module for module in model_with_adapter(folder).modules() if isinstance(module, QuantLinear))
    with pytest.raises(ConfigError) as refusal:
        fully_shard(layer.unprepare(), mesh=init_device_mesh("cpu", (2,)))
    return found | {"unprepared": str(refusal.value)}


def fsdp1(folder: str, adapter: Path) -> str:
    """What it says."""
    policy = functools.partial(size_based_auto_wrap_policy, min_num_params=1000)
    try:
        model: nn.Module = model_with_adapter(folder)
        FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return "nothing"


WAYS: dict[str, Callable[..., Any]] = {
    "accelerate": accelerated,
    "FSDP2": functools.partial(accelerated, sharded=True),
    "Trainer": trainer,
    "state dicts": state_dicts,
    "FSDP1": fsdp1,
}


if __name__ == "__main__":
    folder, out, *ways = sys.argv[1:]
    torch.set_num_threads(1)
    found = {}
    for way in ways:
        found[way] = WAYS[way](folder, Path(out) / way)
        AcceleratorState._reset_state()
    if torch.distributed.get_rank() == 0:
        (Path(out) / "losses.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
