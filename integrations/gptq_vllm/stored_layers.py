"""Which stored layers a layer of the model consists of, what the model expects of them, and the specs that follow."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gptq_backend import ConfigError, QuantizeConfig, StoredSpec
from gptq_backend.format import TensorFile, TensorInfo, read_settings, read_tensor, resolve_specs

from .checkpoint import Checkpoint, own_name
from .compat import init_logger
from .fused import FusedLayers
from .load_report import LoadReport
from .reloads import Reloads

logger = init_logger(f"vllm.{__name__}")

HEAD = "lm_head"
# Loaders that fill the parameters of a model that was loaded before, or none.
_OTHER_LOADERS = {"dummy", "sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache"}


@dataclass(frozen=True)
class ExpectedLayer:
    """What the model expects of one stored layer.

    Args:
        in_features, out_features: of the whole layer, all ranks together; None for as stored.
    """

    in_features: int
    out_features: int | None
    has_bias: bool = False


class StoredLayers:
    """The layers of a checkpoint as a model uses them. All layers of the model share this.

    Args:
        model: what vLLM calls the checkpoint: a folder, or a name in the hub.
    """

    def __init__(self, checkpoint: Checkpoint, settings: QuantizeConfig, backend: str | None, model: str) -> None:
        self.checkpoint, self.settings, self.backend = checkpoint, settings, backend
        self.report, self.reloads, self.fused = LoadReport(), Reloads(), FusedLayers()
        self._expected: dict[str, ExpectedLayer] = {}  # by vLLM's names
        self._specs: dict[str, StoredSpec] = {}  # by the file's names
        self.pairs_to_halves = False  # vLLM sorts the channels of each head, of dense weights only
        self._source: Any = None  # vLLM's config of the model, in which a reload may name another folder
        self._model = model

    def for_another_model(self) -> StoredLayers:
        """The layers of the same checkpoint as another model uses them."""
        return StoredLayers(self.checkpoint.for_another_model(), self.settings, self.backend, self._model)

    def follow(self, config: Any) -> None:
        """Read from where vLLM's ``config`` says, also when that changes.

        Raises:
            ConfigError: its load format brings no checkpoint's tensors.
        """
        if (how := config.load_config.load_format) in _OTHER_LOADERS:
            raise ConfigError(
                f"--load-format {how} does not load a checkpoint's own tensors, which a GPTQ model needs; leave it "
                "out, or choose safetensors"
            )
        if config.model_config.model == self._model:  # and not the target, while its draft is built
            self._source = config.model_config

    def current_reload(self) -> int:
        """Number of the reload that vLLM is making. When one begins, the checkpoint that it reads is opened.

        Raises:
            CheckpointError, ConfigError: there is none that can be served.
        """
        model = self._model if self._source is None else self._source.model
        if (moved := model != self._model) or self.reloads.another_began():
            # Also the same folder, for whoever trains a model may write every state of it there; not a hub's snapshot.
            if moved or os.path.isdir(model):
                settings = read_settings(model)
                self.checkpoint = self.checkpoint.of_another_folder(model, settings)
                self.settings = QuantizeConfig.from_dict(settings)
                self._model, self._specs = model, {}
            self.reloads.count()
        return self.reloads.number

    def check_model(self, hf_config: Any) -> None:
        """Correct what ``config.json`` says and the checkpoint shows to be otherwise.

        Raises:
            ConfigError: vLLM's class of the model cannot hold a layer that is quantized.
        """
        manifest = self.checkpoint.manifest
        self.pairs_to_halves = getattr(hf_config, "model_type", None) in ("llama4", "llama4_text")
        if f"{HEAD}.qweight" in manifest and getattr(hf_config, "tie_word_embeddings", False):
            logger.info("%s is quantized, so it is not the embedding, though config.json ties them", HEAD)
            hf_config.tie_word_embeddings = False  # else models take the embedding and never ask for a head
        fused = [name for name in manifest if name.endswith("query_key_value.qweight")]
        if fused and getattr(hf_config, "model_type", None) == "bloom":
            raise ConfigError(
                f"{fused[0]}: vLLM's Bloom sorts the rows of this layer as if it were dense, so that it cannot be "
                "served quantized; use transformers, or quantize with query_key_value left in 16 bits"
            )

    def names(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
        """vLLM's names, in order, of the stored layers that its layer ``prefix`` consists of; empty if it is dense.

        Args:
            fused: by the last part of a name, those of the layers that vLLM fuses into one.
        """
        name = prefix.rpartition(".")[2]
        names = [prefix.removesuffix(name) + shard for shard in fused.get(name, [name])]
        found = [self.checkpoint.is_quantized(name) for name in names]
        if any(found):
            return names
        if self.checkpoint.is_quantized(prefix):  # a fused layer that also is one in the file, as Phi-3 has it
            return [prefix]
        # Not known by these names: a model that renames in its loader. What arrives will tell.
        return names if None in found and self.settings.for_module(own_name(prefix)) is not None else []

    def embedding(self, prefix: str) -> str | None:
        """vLLM's name of the input embedding ``prefix``; some models do not tell it, and then it is found by its name.
        None if it is not known.
        """
        return prefix or self.checkpoint.embedding()

    def embedding_by_token(self, name: str, vocabulary: int, width: int) -> bool:
        """The layout of a quantized embedding, see :mod:`gptq_backend.embedding`."""
        stored = self.checkpoint.stored_name(name)
        if vocabulary == width:
            return not any(f"{HEAD}.{part}" in self.checkpoint.manifest for part in ("weight", "qweight"))
        return self.checkpoint.manifest[f"{stored}.qweight"].shape[-1] == vocabulary

    def expect(self, name: str, layer: ExpectedLayer) -> None:
        """Announce what the model expects of layer ``name``, before a spec is asked for."""
        self._expected[name] = layer

    def specs(self) -> dict[str, StoredSpec]:
        """Specs of the expected layers that are quantized, by their names in the file.

        Raises:
            CheckpointError: tensors are missing or do not fit together or to the model.
        """
        shapes, biased, manifest = {}, set(), self.checkpoint.manifest
        for expected, layer in self._expected.items():
            name = self.checkpoint.stored_name(expected)
            if name is not None and (qweight := manifest.get(f"{name}.qweight")) is not None:
                shapes[name] = (layer.in_features, layer.out_features or qweight.shape[-1])
                biased |= {name} if layer.has_bias else set()
        return resolve_specs(manifest, self.settings, shapes, biased)

    def translated(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of layer ``name`` that the loader brought, as GPTQ would have stored it; other dense layers as they are.

        Raises:
            CheckpointError: damaged values.
        """
        foreign = self.checkpoint.foreign(name)
        return tensors if foreign is None else foreign.translate(tensors)

    def spec(self, name: str, layer: ExpectedLayer, tensors: Mapping[str, Tensor]) -> tuple[StoredSpec, Tensor | None]:
        """Spec of layer ``name``, and its bias if the model does not know of one that is not zero.

        Args:
            tensors: all of it that the loader brought, by part.

        Raises:
            CheckpointError: its tensors do not fit together or to the model.
        """
        stored = self.checkpoint.stored_name(name)
        if stored is None:
            file = TensorFile(self.checkpoint.folder)
            infos = {
                f"{name}.{part}": TensorInfo(tensor.dtype, tuple(tensor.shape), file, f"{name}.{part}")
                for part, tensor in tensors.items()
            }
            shape = (layer.in_features, layer.out_features or tensors["qweight"].shape[-1])
            return resolve_specs(infos, self.settings, {name: shape})[name], None
        if stored not in self._specs:
            # All at once: what is wrong with a config is wrong for many layers, and said once.
            self._specs = self.specs()
        spec = self._specs[stored]
        return spec, self.unknown_bias(name, layer) if spec.has_bias else None

    def unknown_bias(self, name: str, layer: ExpectedLayer) -> Tensor | None:
        """The bias of layer ``name``, if the file has one that the model does not know of."""
        info = self.checkpoint.manifest.get(f"{self.checkpoint.stored_name(name)}.bias")
        return None if layer.has_bias or info is None else read_tensor(info)
