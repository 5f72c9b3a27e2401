"""How far a run is, how long it will still take, and its memory: a bar, lines for people, or JSON for tools."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import nn

from gptq_backend import Events, LayerReport
from gptq_transformers.memory import used_bytes

from .formatting import duration, megabytes, percent, significant
from .terminal import printable, write_json_line


class Pace:
    """Of the blocks that this run quantizes: those that an earlier one has finished cost next to nothing."""

    def __init__(self) -> None:
        self.seconds, self.layers = 0.0, 0  # of finished blocks
        self._since: float | None = None  # the current block began; None: an earlier run has finished it
        self._layers = 0  # done in the current block

    def begin_block(self) -> None:
        """The time counts from here."""
        self.end_block()
        self._since, self._layers = time.perf_counter(), 0

    def restored(self) -> None:
        """The current block is not made by this run."""
        self._since = None

    def layer(self) -> None:
        """One more is done."""
        self._layers += 1

    def end_block(self) -> None:
        """The time since the beginning was this block's."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self.layers += self._layers
        self._since = None

    def left(self, layers: int) -> float | None:
        """Seconds for so many layers, which are still to be done; None before this run has done any.

        By whole blocks, once there is one: the layers of a block differ, and training comes at its end.
        """
        current = 0.0 if self._since is None else time.perf_counter() - self._since
        done = 0 if self._since is None else self._layers
        if self.layers:
            return max(0.0, self.seconds / self.layers * (layers + done) - current)
        return current / done * layers if done else None


class RunProgress(Events):
    """Shows a run on stderr: on a terminal as a bar over its layers, then over the steps of a distillation; elsewhere
    as a line for each block, and for each tenth of the steps, or of the layers of a run without blocks.

    Use as a context manager.

    Args:
        console: stderr.
        first: what comes before the first layer.
        json_lines: also tell stdout, an object in each line (docs/cli.md).
    """

    def __init__(self, console: Console, first: str = "loading the model", json_lines: bool = False) -> None:
        self._console, self._json_lines = console, json_lines
        self.choice: Any = None
        self.plan: Any = None
        self._pace = Pace()
        self._blocks = [0, 0]  # done, and in all
        self._layers = [0, 0]
        self._block: dict[str, Any] = {}  # the current one
        self._distilling: tuple[float, int] | None = None  # when it began, and how many steps were done then
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[result]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(first, total=None, result="")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def calibration_chosen(self, choice: Any) -> None:
        """Show what ``calibration="auto"`` chose, and keep it in ``choice``."""
        self.choice = choice
        self._console.print(f"calibration: {choice.summary()}", soft_wrap=True)
        self._tell("calibration", summary=choice.summary())

    def sensitivity_step(self, done: int, total: int) -> None:
        """Show how far the measuring for a budget is."""
        self._tell("sensitivity", steps_done=done, steps=total)
        self._show("sensitivity", "measuring what rounding costs", done, total, None)

    def budget_planned(self, plan: Any) -> None:
        """Show what was chosen for a budget, and keep it in ``plan``."""
        self.plan = plan
        self._bar.reset(self._task, total=None, description="")
        facts = f"{plan.layer_bits:.2f} bits per weight of a layer, {megabytes(plan.nbytes)} in all"
        text = f"{plan.summary()}; {facts}; predicted KL divergence {significant(plan.divergence)}"
        self._console.print(f"budget of {plan.goal}: {text}", soft_wrap=True)
        self._tell("budget", **plan.report())

    def structure_found(self, blocks: int, layers: int) -> None:
        """Show how much there is to do."""
        self._blocks, self._layers = [0, blocks], [0, layers]
        self._tell("start", blocks=blocks, layers=layers)

    def block_needed(self, name: str, block: nn.Module) -> None:
        """A block's time begins."""
        self._block = {"name": name, "restored": False}
        self._pace.begin_block()

    def block_restored(self, name: str) -> None:
        """Its layers, which come next, say nothing about the time left."""
        self._block["restored"] = True
        self._pace.restored()

    def layer_done(self, layer: LayerReport, done: int, total: int) -> None:
        """Show one finished layer."""
        self._layers = [done, total]
        self._pace.layer()
        self._tell("layer", name=layer.name, relative_loss=layer.relative_loss, layers_done=done, layers=total)
        blocks_done, blocks = self._blocks
        name = f"block {blocks_done + 1}/{blocks} {layer.name}" if blocks else layer.name
        if self._console.is_terminal or not blocks:
            self._show(name, f"error {percent(layer.relative_loss)}", done, total, self._pace.left(total - done))

    def block_done(self, name: str, block: nn.Module) -> None:
        """Show one finished block."""
        self._pace.end_block()
        if self._blocks[0] < self._blocks[1]:  # some models come to a block more than once
            self._blocks[0] += 1
        (done, total), (now, peak) = self._layers, used_bytes()
        left = self._pace.left(total - done)
        facts = {"blocks_done": self._blocks[0], "blocks": self._blocks[1], "layers_done": done, "layers": total}
        self._tell("block", **self._block, **facts, seconds_left=left, memory_bytes=now, peak_memory_bytes=peak)
        if not self._console.is_terminal:
            by = " by an earlier run" if self._block["restored"] else ""
            self._line(f"block {self._blocks[0]}/{self._blocks[1]} {name} done{by}, {done}/{total} layers", left)

    def training_step(self, done: int, total: int, loss: float) -> None:
        """Show one step of the distillation."""
        if self._distilling is None:
            self._distilling = time.perf_counter(), done - 1  # the first steps may be of an earlier run
            self._bar.reset(self._task, total=total, completed=done - 1)
        start, before = self._distilling
        left = (time.perf_counter() - start) / (done - before) * (total - done)
        self._tell("step", steps_done=done, steps=total, divergence=loss, seconds_left=left)
        self._show("distillation", f"divergence {significant(loss)}", done, total, left)

    def result(self, report: dict[str, Any]) -> None:
        """The run is over."""
        self._tell("result", report=report)

    def _show(self, name: str, result: str, done: int, total: int, left: float | None) -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, description=name, completed=done, total=total, result=f"{result}{_rest(left)}")
        elif done % max(1, total // 10) == 0 or done == total:
            self._line(f"{done}/{total} {name}: {result}", left)

    def _line(self, text: str, left: float | None) -> None:
        print(printable(f"{text}{_rest(left)}"), file=sys.stderr, flush=True)

    def _tell(self, event: str, **facts: Any) -> None:
        if self._json_lines:
            write_json_line({"event": event, **facts})


def _rest(left: float | None) -> str:
    """The end of every line."""
    now, peak = used_bytes()
    time_left = "" if left is None else f", {duration(left)} left"
    return f"{time_left}, memory {megabytes(now)} (at most {megabytes(peak)})"
