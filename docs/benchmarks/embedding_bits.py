"""Round the embedding of a quantized checkpoint, so that checkpoints differ in nothing else (docs/accuracy.md).

    python docs/benchmarks/embedding_bits.py MODEL OUT BITS [TEXT [GROUP]]

A tied weight of 4 bits is rounded by GPTQ for the inputs of the head, on 16 windows of 512 tokens of TEXT, as a run of
``gptq-backend quantize --embed-bits 4`` does it; the rest is rounded to nearest. GROUP is that of the embedding, if it
is to differ from the layers'.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_backend.algorithm import Hessian, prepare_factor, quantize_weight
from gptq_backend.model import sample_windows, split_windows
from gptq_backend.pipeline import find_embedding
from gptq_transformers.quantized_layers import untie_quantized

WINDOWS, LENGTH = 16, 512


def main(folder: str, out: str, bits: str, text: str | None = None, group: str | None = None) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    settings = model.config.quantization_config
    config = dataclasses.replace(settings.to_quantize_config(), embed_bits=int(bits))
    config = dataclasses.replace(config, group_size=int(group)) if group else config
    target = find_embedding(model, config)
    assert target is not None
    if target.calibrated:
        assert text, "a tied weight of 4 bits needs a text to calibrate on"
        head = model.get_output_embeddings()
        hessian = Hessian(head.in_features)
        hook = head.register_forward_pre_hook(lambda _, inputs: hessian.add(inputs[0].flatten(0, -2).float()))
        ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
        with torch.inference_mode():
            for window in sample_windows(split_windows(ids, LENGTH, tokenizer), WINDOWS):
                model(torch.as_tensor(window)[None], use_cache=False)
        hook.remove()
        factor = prepare_factor(hessian.matrix("head"), target.config, hessian.tokens)
        weight = target.module.weight.detach().float()
        rounded = quantize_weight(weight, factor, target.config, hessian.tokens, name=target.name).weight
    else:
        rounded = target.round()
    target.install(model, rounded, None)
    untie_quantized(model)
    settings.dynamic = {**target.rule, **(getattr(settings, "dynamic", None) or {})}
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
