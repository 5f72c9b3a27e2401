"""How fast does a model generate: a quantized one, its reference, and another program, in turns."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from gptq_backend import GPTQError, QuantLinear
from gptq_backend.bench import quartiles, synchronize
from gptq_transformers.experts.expert_list import ExpertList
from gptq_transformers.fused.forward import FusedForward

from .bench_peer import LlamaCpp
from .models import model_limits


@dataclass(frozen=True)
class Row:
    """One phase of generation by one model."""

    model: str  # folder or name
    quantized: bool | None  # it has QuantLinears; None: it is a peer's
    compiled: bool  # its forward went through torch.compile
    phase: str  # "prefill", from the call of generate to the first token, or "decode", all later tokens
    dtype: str  # what the model computes in
    batch: int
    prompt: int
    new_tokens: int
    tokens_per_second: float  # over the whole batch; median of the repetitions
    spread: tuple[float, float]  # its quartiles
    ms_per_step: float  # median milliseconds of a forward pass and what generate does around it
    ratio: float | None = None  # speed in units of the reference's in the same phase and mode


@dataclass
class _Runner:
    """A model in one mode, and the seconds per token of each repetition."""

    name: str
    model: nn.Module
    compiled: Callable[..., Any] | None = None
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "quantized": any(isinstance(module, QuantLinear) for module in self.model.modules()),
            "compiled": self.compiled is not None,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def generate(self, prompt: Tensor, new_tokens: int) -> list[float]:
        """The time before the call and after each new token. prompt: int [B, T]."""
        model: Any = self.model
        watch = _Stopwatch(prompt.device)
        options: dict[str, Any] = {} if self.compiled is None else {"cache_implementation": "static"}
        settings = copy.deepcopy(model.generation_config)
        settings.eos_token_id = None  # min_new_tokens would do, but costs as much as two layers of a small model
        with _forward(model, self.compiled), torch.no_grad():
            watch.tick()
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=settings,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([watch]),
                **options,
            )
        return watch.times


class _Stopwatch(StoppingCriteria):
    """Never stops generation, which asks it after every token; notes the time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def tick(self) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def _forward(module: nn.Module, replacement: Callable[..., Any] | None) -> Iterator[None]:
    """``module.forward`` is ``replacement`` for a while."""
    before = vars(module).get("forward")
    if replacement is not None:
        module.forward = replacement
    try:
        yield
    finally:
        if before is not None:
            module.forward = before
        elif replacement is not None:
            del module.forward


def run(
    models: Sequence[tuple[str, nn.Module]],
    batch: int = 1,
    prompt: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    compiled: bool = False,
    peer: LlamaCpp | None = None,
) -> list[Row]:
    """Alternate the models for ``repeats`` rounds after two that do not count (both may compile).

    Args:
        models: names and models; ratios refer to the last one if there are two, or else to the peer.
        compiled: time each model through torch.compile (static cache) beside eager.
        peer: takes its turn behind them.

    Raises:
        GPTQError: the lengths exceed a model, or leave nothing to measure.
    """
    if new_tokens < 2:
        raise GPTQError(f"new_tokens={new_tokens} leaves no token to decode after the first; use 2 or more")
    runners: list[_Runner | LlamaCpp] = [_Runner(name, model) for name, model in models]
    bases = {False: runners[1] if len(models) > 1 else peer, True: peer}
    if compiled:
        # On a GPU with CUDA graphs, without which a step of one token is mostly launching.
        mode = "reduce-overhead" if next(models[0][1].parameters()).is_cuda else None
        runners += [_Runner(name, model, torch.compile(model.forward, mode=mode)) for name, model in models]
        bases[True] = runners[-1] if len(models) > 1 else peer
    runners += [] if peer is None else [peer]
    ids = {name: random_prompt(model, batch, prompt, new_tokens) for name, model in models}
    for repeat in range(-2, repeats):
        for runner in runners:
            start, first, *_, last = runner.generate(ids.get(runner.name, ids[models[0][0]]), new_tokens)
            if repeat >= 0:
                runner.prefill.append((first - start) / prompt / batch)
                runner.decode.append((last - first) / (new_tokens - 1) / batch)
    rows = []
    for runner in runners:
        base = bases[runner.facts["compiled"]]
        for phase in ("prefill", "decode"):
            rows.append(_row(runner, base, phase, batch, prompt, new_tokens))
    return rows


def _row(
    runner: _Runner | LlamaCpp, base: _Runner | LlamaCpp | None, phase: str, batch: int, prompt: int, new_tokens: int
) -> Row:
    first, median, third = quartiles(getattr(runner, phase))
    return Row(
        model=runner.name,
        **runner.facts,
        phase=phase,
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        tokens_per_second=1 / median,
        spread=(1 / third, 1 / first),
        ms_per_step=median * batch * (prompt if phase == "prefill" else 1) * 1e3,
        ratio=None if base is None else quartiles(getattr(base, phase))[1] / median,
    )


def random_prompt(model: nn.Module, batch: int, prompt: int, new_tokens: int) -> Tensor:
    """int64 [batch, prompt] of the model's vocabulary.

    Raises:
        GPTQError: the model has fewer positions than ``prompt + new_tokens``.
    """
    positions, vocabulary = model_limits(model)
    if prompt + new_tokens > positions:
        raise GPTQError(f"a prompt of {prompt} and {new_tokens} new tokens exceed the model's {positions} positions")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, int(vocabulary), (batch, prompt), generator=generator).to(device)


def profile(model: nn.Module, prompt: Tensor, new_tokens: int) -> dict[str, dict[str, Any]]:
    """Where the time of one eager ``generate`` goes: ``{phase: {kind: {share, ms_per_step, calls_per_step}}}``.

    Kinds are QuantLinear, Linear (``lm_head`` among them), ExpertList and decoder layers that run in few calls with all
    that is inside, and rest. Looking costs about a microsecond a call. prompt: int [B, T].
    """
    spans: list[tuple[str, float, float]] = []
    device = prompt.device

    def watched(kind: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize(device)
            start = time.perf_counter()
            result = forward(*args, **kwargs)
            synchronize(device)
            spans.append((kind, start, time.perf_counter()))
            return result

        return call

    runner = _Runner("", model)
    runner.generate(prompt, 2)
    with contextlib.ExitStack() as stack:
        kinds = {module: _kind(module) for module in model.modules()}
        whole = [module for module, kind in kinds.items() if kind in _WITH_ALL_INSIDE]
        inside = {child for each in whole for child in each.modules() if child is not each}
        for module, kind in kinds.items():
            if kind is not None and module not in inside:
                stack.enter_context(_forward(module, watched(kind, module.forward)))
        start, first, *_, last = runner.generate(prompt, new_tokens)
    phases = {"prefill": (start, first, 1), "decode": (first, last, new_tokens - 1)}
    return {phase: _shares(spans, *limits) for phase, limits in phases.items()}


_WITH_ALL_INSIDE = (ExpertList.__name__, "fused layer")


def _kind(module: nn.Module) -> str | None:
    if isinstance(vars(module).get("forward"), FusedForward):
        return "fused layer"
    return next((each.__name__ for each in (QuantLinear, nn.Linear, ExpertList) if isinstance(module, each)), None)


def _shares(spans: Sequence[tuple[str, float, float]], start: float, end: float, steps: int) -> dict[str, Any]:
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for kind, entered, left in spans:
        if start <= entered < end:
            seconds[kind] += left - entered
            calls[kind] += 1
    seconds["rest"] = end - start - sum(seconds.values())
    return {
        kind: {
            "share": spent / (end - start),
            "ms_per_step": spent / steps * 1e3,
            "calls_per_step": calls[kind] / steps,
        }
        for kind, spent in seconds.items()
    }


def lines(rows: Sequence[Row], profiles: Mapping[str, Any], overhead: Mapping[str, float]) -> Iterator[str]:
    """For people: a table of the rows, then what :func:`profile` found by model and what a call costs, if known."""
    width = max(len(row.model) for row in rows) + 2
    yield f"\n{'model':<{width}}{'mode':<10}{'phase':<9}{'tokens/s':>10}{'quartiles':>20}{'ms/step':>10}{'x ref':>8}"
    for row in rows:
        mode = "compiled" if row.compiled else "eager"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        spread = f"{row.spread[0]:.1f}-{row.spread[1]:.1f}"
        yield (
            f"{row.model:<{width}}{mode:<10}{row.phase:<9}{row.tokens_per_second:>10.1f}{spread:>20}"
            f"{row.ms_per_step:>10.2f}{ratio:>8}"
        )
    for path, phases in profiles.items():
        for phase, kinds in phases.items():
            parts = [
                f"{kind} {part['share']:.0%} ({part['ms_per_step']:.2f} ms, {part['calls_per_step']:.0f} calls)"
                for kind, part in kinds.items()
            ]
            yield f"{path}, {phase}, per step: {'; '.join(parts)}"
    if overhead:
        yield "a call on a 16x16 layer: " + ", ".join(f"{name} {us:.1f} us" for name, us in overhead.items())
