"""Which tokens matter: how much an error in a layer's output at each token moves what the tokens exchange.

Attention heads that have nothing to look for look at the first token of a sequence, so half of what a head passes on
may be that one token's value; in a sum over all tokens it is one of 512. A Hessian that counts all tokens alike leaves
v_proj inaccurate just there, and that error, the same at every later token, outweighs those of all other layers
(docs/benchmarks/notes.md). So before a block is quantized, each batch goes through its attention once more, and errors
of random sign are followed backwards from the first layer that reads mixed tokens (o_proj) to those before it (q, k,
v).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..timing import timed

logger = logging.getLogger(__name__)
_DRAWN = 4  # sequences whose signs are drawn together


class _Found(BaseException):
    """Ends the pass through a block; not an Exception, so that no model code catches it."""


class Sensitivity:
    """Token weights of the layers of one model, block by block."""

    def __init__(self) -> None:
        self._tables: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self.running = False  # for hooks that are to do nothing meanwhile
        self._fruitless = ""  # the block whose other batches need not be tried

    def end(self) -> None:
        """Called in a pass that need not go on: what was found until then is all."""
        raise _Found

    @timed("sensitivity")
    def of(
        self,
        block: nn.Module,
        name: str,
        layers: Iterable[nn.Module],
        run: Callable[[], Any],
        mask: Tensor | None,
        first: int,
        tell: Callable[[nn.Module, Tensor], None] | None = None,
    ) -> dict[nn.Module, Tensor]:
        """Weights of one batch.

        With y_t the output of a layer at token t, z the input of the first layer that follows the mixing of tokens, and
        random signs r, the weight of t is ``|| d(r z) / d y_t ||^2``, whose expectation is the sum over all z_i of
        their squared derivatives (Hutchinson's estimator of a trace), padding and each sequence's first token aside.
        Layers that read one tensor get the sum of their weights.

        Args:
            block: the module that ``run`` calls with one batch; its parameters get no gradients.
            name: of the block, for messages and to tell blocks apart.
            layers: those of its layers that are to be quantized.
            mask: [B, T], 0 marks padding.
            first: number of the batch's first sequence among all; each sequence has its own signs.
            tell: gets the derivatives [B, T, N] by the outputs of each layer that has weights.

        Returns:
            [B, T] by layer, at least float32; only of layers whose outputs are mixed before the next layer, which gets
            [B, T, K]. A batch that gave none, or an error, answers for all that follow it in the same block.
        """
        if name == self._fruitless:
            return {}
        pass_ = _Pass(partial(self._signs, first), mask)
        trained: list[nn.Parameter] = []  # parameters to make trainable again
        self.running = True
        try:
            if torch.is_inference_mode_enabled():
                raise RuntimeError("the model was loaded in inference mode")
            trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.requires_grad_(False)
            with torch.enable_grad(), ExitStack() as stack:
                for layer in layers:
                    stack.callback(layer.register_forward_pre_hook(pass_.before, with_kwargs=True).remove)
                    stack.callback(layer.register_forward_hook(pass_.after, with_kwargs=True).remove)
                run()
        except _Found:
            pass
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation without a derivative
            reason = str(error)  # whoever keeps the message must not keep the graph
            logger.warning("%s: every token counts the same, no derivative could be taken: %s", name, reason)
        finally:
            self.running = False
            for parameter in trained:
                parameter.requires_grad_(True)
        if not pass_.weights and not pass_.alone:
            self._fruitless = name
        pass_.seen.clear()  # the graph
        while tell is not None and pass_.derivatives:
            tell(*pass_.derivatives.popitem())
        return pass_.weights

    def _signs(self, first: int, length: int, like: Tensor) -> Tensor:
        """[B, length, K] for z [B, T, K] of a batch, 1 and -1 at random; padding and other batches change none.

        One table, with other signs of rows and of columns for every sequence. With the same for all, the two halves of
        the batches in row_moments.py would agree by the signs alone.
        """
        stop, channels = first + like.shape[0], like.shape[-1]
        drawn = []
        for group in range(first // _DRAWN, -(-stop // _DRAWN)):
            generator = torch.Generator().manual_seed(group + 1)
            drawn.append(torch.cat([_random_signs(generator, size, _DRAWN) for size in (channels, length)]))
        mine = torch.cat(drawn, dim=1)[:, first % _DRAWN :][:, : stop - first].t().to(like)
        columns, rows = mine.split([channels, length], dim=1)
        return self._table(length, like) * rows.unsqueeze(2) * columns.unsqueeze(1)

    def _table(self, length: int, like: Tensor) -> Tensor:
        """[length, K], the beginning of the same one always."""
        key = (like.shape[-1], like.device, like.dtype)
        table = self._tables.get(key)
        if table is None or len(table) < length:
            rows = 1 << (length - 1).bit_length()
            signs = _random_signs(torch.Generator().manual_seed(0), rows, key[0])
            table = self._tables[key] = signs.to(like)
        return table[:length]


def _random_signs(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.int8).mul_(2).sub_(1)


class _Pass:
    """The hooks of one pass and what they saw."""

    def __init__(self, signs: Callable[[int, Tensor], Tensor], mask: Tensor | None) -> None:
        self.signs, self.mask = signs, mask
        self.seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # input and output of each layer's first call
        self.weights: dict[nn.Module, Tensor] = {}
        self.derivatives: dict[nn.Module, Tensor] = {}  # d(r z) / d y
        self.alone = False  # no sequence has a second token, to which the first could matter

    def after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Derivatives begin at the first layers' outputs."""
        if layer in self.seen:  # the first call is the one that the layer is quantized for
            return output
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        self.seen[layer] = (_first(args, kwargs), output)
        return output.clone()  # the model may write into it

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        z = _first(args, kwargs)
        if not z.requires_grad or z.dim() != 3:  # of none of them, or of experts, whose tokens have lost their places
            return
        positions = self.positions(z)
        if int(positions.max()) < 1:
            self.alone = True
            return
        signs = self.signs(z.shape[1], z).gather(1, positions.clamp(min=0).unsqueeze(2).expand_as(z))
        signs[positions <= 0] = 0  # padding; and the first token, so that a weight there can only come from others
        first = positions == 0
        outputs = [output for _, output in self.seen.values()]
        gradients = torch.autograd.grad(z, outputs, signs, retain_graph=True, allow_unused=True)
        weights = {
            layer: gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square().sum(-1).reshape(z.shape[:2])
            for layer, gradient in zip(self.seen, gradients)
            if gradient is not None and without_ones(gradient.shape[:-1]) == without_ones(z.shape[:2])
        }
        if any(weight[first].any() for weight in weights.values()):
            for layer in weights:
                x, _ = self.seen[layer]
                readers = [each for other, each in weights.items() if self.seen[other][0] is x]
                self.weights[layer] = torch.stack(readers).sum(0)
            self.derivatives = {layer: each for layer, each in zip(self.seen, gradients) if layer in weights}
            raise _Found

    def positions(self, z: Tensor) -> Tensor:
        """[B, T], the place of each token in its sequence; -1 for padding."""
        if self.mask is None or self.mask.shape != z.shape[:2]:
            return torch.arange(z.shape[1], device=z.device).expand(z.shape[:2])
        mask = self.mask.to(z.device).long()
        return (mask.cumsum(1) * mask) - 1


def without_ones(shape: torch.Size) -> list[int]:
    """Latent attention in transformers keeps its latents as [B, 1, T, K]."""
    return [size for size in shape if size != 1]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(iter((*args, *kwargs.values())))
