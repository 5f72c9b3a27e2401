"""A ``.gguf`` file as the source of a conversion: names, config and tokenizer as transformers maps them.

Blocks that have a scale and no minimum become a packed weight exactly; matrices of other types are rounded to 8 bits in
groups of 32 from the values that the package gguf gives. What is not a linear layer of the model (embeddings, norms) is
dequantized to float16.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptq_backend import CheckpointError, ConfigError, GPTQError, QuantizeConfig, QuantizedWeight
from gptq_backend.algorithm import round_to_nearest
from gptq_backend.format import EXACT_TYPES, check_header, read_blocks
from gptq_backend.model import is_linear

from ..errors import first_line, load_errors
from ..model_class import causal_class, from_config
from .source import Source

logger = logging.getLogger(__name__)

_FLOATS = ("F32", "F16", "BF16")
_ROUNDED = QuantizeConfig(bits=8, group_size=32, sym=False, quality="fast")


class GGUFSource(Source):
    """See the module."""

    def __init__(self, file: Path) -> None:
        """Raises ConfigError: gguf is missing, or the architecture is not known. GPTQError: it cannot be read."""
        self._file, self._gguf = file, _package()
        check_header(file)
        from transformers import AutoConfig, AutoModelForCausalLM

        with load_errors(file, (Exception,)):  # of a library, for a file of any content
            self._reader: Any = self._gguf.GGUFReader(str(file))
            self._config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            with torch.device("meta"):
                model = from_config(AutoModelForCausalLM, self._config)
            self._tensors, self._processor = self._mapped(model)
        self._linear = {f"{name}.weight" for name, module in model.named_modules() if is_linear(module)}
        self.layers = [
            name.removesuffix(".weight")
            for name, tensor in self._tensors.items()
            if name in self._linear and tensor.tensor_type.name not in _FLOATS
        ]
        self._check_shapes(model)
        self.settings: dict[str, Any] = {}
        self.rounded: dict[str, float] = {}
        self.model_config = {**self._config.to_dict(), "architectures": [causal_class(self._config)]}
        self.model_config |= {key: "float16" for key in ("dtype", "torch_dtype") if key in self.model_config}
        kinds = {self._tensors[f"{name}.weight"].tensor_type.name for name in self.layers} - {*EXACT_TYPES}
        if kinds:
            self.lossy = (
                f"blocks of type {', '.join(sorted(kinds))} have minimums that no integer zero stands for: they were "
                "rounded to 8 bits in groups of 32"
            )

    def _mapped(self, model: nn.Module) -> tuple[dict[str, Any], Any]:
        """The file's tensors by transformers' names, and what transformers does to their values."""
        from transformers import modeling_gguf_pytorch_utils as mapping

        architecture = str(self._reader.fields["general.architecture"].contents())
        processors = getattr(mapping, "TENSOR_PROCESSORS", {})
        processor = processors.get(architecture, mapping.TensorProcessor)(config=self._config.to_dict())
        name_map: Any = mapping.get_gguf_hf_weights_map
        more = [processor] if "processor" in inspect.signature(name_map).parameters else []  # not in transformers 4
        names = name_map(model, *more)
        found = {names[tensor.name]: tensor for tensor in self._reader.tensors if tensor.name in names}
        unnamed = (tensor.name for tensor in self._reader.tensors if tensor.name not in names)
        missing = [name for name in unnamed if name != "rope_freqs.weight"]  # a table that models compute
        if missing:
            raise GPTQError(
                f"transformers has no name for {missing[0]} and {len(missing) - 1} other tensors of {self._file}; "
                "convert the original model instead"
            )
        return found, processor

    def _check_shapes(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name, tensor in self._tensors.items():
            if name not in parameters:
                continue
            found, wanted = ([int(size) for size in each] for each in (tensor.shape[::-1], parameters[name].shape))
            if len(wanted) == 2 and sorted(found) != sorted(wanted):  # some models have theirs transposed
                raise CheckpointError(
                    f"{self._file}: {name} has shape {found}, expected {wanted} by the settings in it; the file is "
                    "damaged, fetch it again"
                )
            if len(wanted) > 2 and "conv" not in name:
                raise ConfigError(
                    f"{self._file} has the experts of a mixture ({name}), which cannot be converted from GGUF; "
                    "quantize the original model instead"
                )

    def quantized(self, layer: str) -> QuantizedWeight:
        tensor = self._tensors[f"{layer}.weight"]
        data = torch.from_numpy(np.array(tensor.data)).view(torch.uint8)
        features = int(tensor.shape[0])  # GGUF names the fastest dimension first
        rows = self._order(tensor)
        weight = read_blocks(layer, tensor.tensor_type.name, data.reshape(int(tensor.shape[1]), -1), features)
        if weight is None or rows is None:
            return round_to_nearest(self.dense(layer), _ROUNDED)
        codes, scales, zeros = (part[:, rows].contiguous() for part in (weight.codes, weight.scales, weight.zeros))
        return QuantizedWeight(codes, scales, zeros, weight.g_idx, weight.bits)

    def _order(self, tensor: Any) -> Tensor | None:
        """int64 [N]: where transformers puts the rows of a matrix: it shows on their numbers. None if it does more."""
        count = int(tensor.shape[1])
        numbers = np.arange(count, dtype=np.float64)[:, None]
        try:
            found = self._processor.process(weights=numbers, name=tensor.name).weights
        except (ValueError, IndexError, KeyError, TypeError):
            return None
        rows = torch.from_numpy(np.ascontiguousarray(found))
        if rows.shape != (count, 1) or not torch.equal(rows[:, 0].sort().values, torch.arange(count).double()):
            return None
        return rows[:, 0].long()

    def dense(self, layer: str) -> Tensor:
        return self._values(self._tensors[f"{layer}.weight"])

    def _values(self, tensor: Any) -> Tensor:
        """float32, as transformers would load it."""
        with load_errors(self._file, (Exception,)):  # what the settings of the file make of its tensors
            values = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            made = self._processor.process(weights=values, name=tensor.name).weights
        return torch.from_numpy(np.array(made, dtype=np.float32))

    def bias(self, layer: str) -> Tensor | None:
        tensor = self._tensors.get(f"{layer}.bias")
        return None if tensor is None else self._half(f"{layer}.bias", tensor)

    def others(self) -> Iterator[tuple[str, Tensor]]:
        mine = {f"{layer}.{part}" for layer in self.layers for part in ("weight", "bias")}
        for name, tensor in self._tensors.items():
            if name not in mine:
                yield name, self._half(name, tensor)

    def _half(self, name: str, tensor: Any) -> Tensor:
        """float16 where the file is no more exact, or quantized."""
        values = self._values(tensor)
        if tensor.tensor_type.name == "F32":
            return values
        half = values.to(torch.bfloat16 if tensor.tensor_type.name == "BF16" else torch.float16)
        if difference := float((half.float() - values).abs().max()):
            self.rounded[name] = difference
        return half

    def dense_layers(self) -> list[str]:
        found = (name.removesuffix(".weight") for name in self._tensors if name in self._linear)
        return [name for name in found if name not in self.layers]

    def copy_files(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained(self._file.parent, gguf_file=self._file.name).save_pretrained(folder)
        except Exception as error:  # of any library: the weights are what was asked for
            logger.warning(
                "the tokenizer of %s was not converted: %s; copy the original one", self._file, first_line(error)
            )


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            f"reading a .gguf file needs the package gguf ({error}); install it: pip install gguf"
        ) from None
