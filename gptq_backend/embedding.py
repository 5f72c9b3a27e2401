"""The quantized embedding of tokens, and the output embedding that is the same weight.

Two layouts are read, and the checkpoint's shapes tell which one it is (docs/format.md):

- by token: the tensors of a linear layer [V, H], hidden channels packed and in groups. An output embedding that is tied
  to it multiplies with the same words.
- by channel: those of a linear layer [H, V], as GPTQModel writes an embedding: tokens packed and in groups.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .format.stored_tensors import StoredSpec, encode
from .format.weight import QuantizedWeight
from .kernels.interface import PreparedWeight
from .kernels.reference import look_up_input
from .lazy_weight import LazyWeight
from .linear import QuantLinear
from .module_moves import offloading_hook

_MARK = "dtype_of_rows"  # an empty parameter of a prepared embedding


class QuantEmbedding(QuantLinear):
    """``y = W[ids]`` with W [V, H] quantized; its life is that of a :class:`QuantLinear`.

    Args:
        spec: of the stored tensors.
        dense: the embedding in whose place it is put; what it computes beside the rows is kept, its weight is not.
        name, backend, device, dtype: as of ``QuantLinear``; ``dtype`` is that of the rows.
        by_token: the layout, see the module.

    Raises:
        ConfigError: ``dense`` does something to its rows that is not known here, or the tensors have another size.
    """

    def __init__(
        self,
        spec: StoredSpec,
        dense: nn.Embedding,
        name: str = "embedding",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        by_token: bool = True,
    ) -> None:
        size = dense.num_embeddings, dense.embedding_dim
        if size != ((spec.out_features, spec.in_features) if by_token else (spec.in_features, spec.out_features)):
            raise ConfigError(
                f"{name}: the quantized weight is [{spec.out_features}, {spec.in_features}], expected that of an "
                f"embedding {list(size)}; config.json and the weights belong to different models: fetch both again"
            )
        # Only the plain row of the table looks up input channels.
        super().__init__(spec, name, backend if by_token else "reference", device, dtype)
        self.by_token = by_token
        self.num_embeddings, self.embedding_dim = size
        self.padding_idx = dense.padding_idx
        self.embed_scale = embed_scale(dense, name, self.compute_dtype)
        self._dense = (_without_weight(dense),)  # in a tuple, hence no submodule

    @classmethod
    def of_weight(
        cls,
        weight: QuantizedWeight,
        dense: nn.Embedding,
        by_token: bool,
        checkpoint_format: str = "gptq",
        word_dtype: torch.dtype = torch.int32,
        name: str = "embedding",
        backend: str | None = None,
    ) -> QuantEmbedding:
        """A prepared one that holds ``weight``, in the place of ``dense``."""
        spec, tensors = encode(weight, checkpoint_format, word_dtype)
        embedding = cls(spec, dense, name, backend, "meta", dense.weight.dtype, by_token)
        embedding._hold(tensors, None)
        embedding.prepare()
        return embedding

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int [...] -> [..., H] in ``compute_dtype``."""
        served = self._served
        if served.weight is None:
            return self._look_up_unprepared(ids)
        parameters = self._parameters if torch.compiler.is_compiling() else served.parameters
        return self._look_up(ids, served.weight, parameters)

    def multiply(self, x: Tensor) -> Tensor:
        """``x @ W.T``, for a tied output embedding. x: float [..., H] -> [..., V] in the dtype of x."""
        weight = self._served.weight
        if weight is None:
            return self._multiply_unprepared(x)
        if torch.compiler.is_compiling():
            return weight.multiply_in_graph(self._parameters, x, None)
        return weight.multiply(x)

    def _look_up(self, ids: Tensor, weight: PreparedWeight, parameters: Mapping[str, Any]) -> Tensor:
        if self.by_token:
            rows = weight.look_up(ids, self.compute_dtype, parameters)
        else:
            rows = look_up_input(ids, weight, self.compute_dtype, parameters)
        return rows if self.embed_scale is None else rows * self.embed_scale

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _look_up_unprepared(self, ids: Tensor) -> Tensor:
        """First call, or weights that an accelerate hook has brought for this call only."""
        if offloading_hook(self) is None:
            self.prepare()
            return self(ids)
        weight = self._prepared_for_call(ids.device)
        return self._look_up(ids, weight, weight.tensors)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _multiply_unprepared(self, x: Tensor) -> Tensor:
        """As above; but nobody called the embedding, so that its hook has brought nothing yet."""
        if (hook := offloading_hook(self)) is None:
            self.prepare()
            return self.multiply(x)
        hook.pre_forward(self)
        try:
            return self._prepared_for_call(x.device).multiply(x)
        finally:
            hook.post_forward(self, None)

    def _hold(
        self, tensors: Mapping[str, Tensor], bias: nn.Parameter | None, prepared: PreparedWeight | None = None
    ) -> None:
        if prepared is not None:
            # The first parameter of floating point tells frameworks the dtype of the model, and scales have their own.
            home = tensors["qweight"].device
            tensors = {_MARK: torch.empty(0, dtype=self.compute_dtype, device=home), **_without_mark(tensors)}
        super()._hold(tensors, bias, prepared)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:
        super()._apply(fn, recurse)
        self.embed_scale = embed_scale(self._dense[0], self.name, self.compute_dtype)
        served = self._served
        if served.weight is not None and served.parameters[_MARK].dtype != self.compute_dtype:
            tensors = {key: each.data for key, each in served.parameters.items() if each is not None}
            self._hold(tensors, None, served.weight)
        return self

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [V, H]; see ``QuantLinear.weight``."""
        if torch.compiler.is_compiling():
            traced = self._traced_weight()
            return traced if self.by_token else traced.t()
        shape = (self.num_embeddings, self.embedding_dim)
        make = functools.partial(self._dense_weight, self.compute_dtype)
        return LazyWeight(self.name, shape, self.compute_dtype, self._device, make, self._scale_weight)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Embedding:  # type: ignore[override]
        """The embedding that it was put in the place of, with the weight rounded once to ``dtype``."""
        weight = self.quantized_weight().dequantize(torch.float32).to(dtype)
        dense = copy.deepcopy(self._dense[0])
        if self.embed_scale is not None and isinstance(getattr(dense, "embed_scale", None), Tensor):
            dense.embed_scale = torch.tensor(embed_scale(dense, self.name, dtype), device=weight.device)
        dense.weight = nn.Parameter(weight if self.by_token else weight.t().contiguous())
        return dense

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        weight = super()._dense_weight(dtype)
        return weight if self.by_token else weight.t().contiguous()


class TiedHead(nn.Module):
    """An output embedding that multiplies with the weight of the input embedding; it has none of its own.

    Args:
        embedding: by token.
        bias: [V] or None.
    """

    bias: nn.Parameter | None

    def __init__(self, embedding: QuantEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, hence no submodule: it is saved and moved in its own place
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", bias)

    @property
    def embedding(self) -> QuantEmbedding:
        return self._embedding[0]

    @property
    def weight(self) -> Tensor:
        """That of the embedding."""
        return self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """x: float [..., H] -> [..., V] in the dtype of x."""
        embedding = self.embedding
        y = embedding.multiply(x.to(embedding.device)).to(x.device)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, weight: Any) -> nn.Linear:
        """An ordinary ``nn.Linear`` that shares the parameter ``weight`` [V, H]."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = weight
        if self.bias is not None:
            linear.bias = self.bias
        return linear

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            if isinstance(value, LazyWeight):
                return  # transformers ties it to the embedding's, which it is
            raise ConfigError(
                f"the output embedding is the same quantized weight as {self.embedding.name} and cannot be assigned; "
                "call model.dequantize() first"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, tied to {self.embedding.name}, bias={self.bias is not None}"


def embed_scale(dense: nn.Embedding, name: str, dtype: torch.dtype) -> float | None:
    """What an embedding multiplies its rows by, in ``dtype``; None for nothing.

    Raises:
        ConfigError: it does something else.
    """
    plain = type(dense).forward is nn.Embedding.forward
    scale = None if plain else getattr(dense, "scalar_embed_scale", getattr(dense, "embed_scale", None))
    if dense.max_norm is not None or (scale is None and not plain) or (isinstance(scale, Tensor) and scale.is_meta):
        raise ConfigError(
            f"{name} is a {type(dense).__name__}, which does more than to look up rows; leave embed_bits out, so that "
            "it stays in 16 bits"
        )
    if scale is None:
        return None
    rounded = isinstance(getattr(dense, "embed_scale", None), Tensor)  # by Gemma, to the dtype of its weight
    return float(torch.as_tensor(scale).to(dtype)) if rounded else float(scale)


def _without_mark(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != _MARK}


def _without_weight(dense: nn.Embedding) -> Any:
    """A copy for :meth:`QuantEmbedding.dequantize`; hooks stay behind."""
    kept = copy.copy(dense)
    kept.__dict__ = {
        key: value for key, value in dense.__dict__.items() if key not in ("_hf_hook", "_old_forward", "forward")
    }
    kept.__dict__["_parameters"] = {"weight": None}
    return kept
