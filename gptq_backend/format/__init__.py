"""What lies in a checkpoint's files, and the one value that a packed weight is in memory."""

from .awq import write_gemm as write_awq
from .compressed_tensors import write as write_compressed_tensors
from .embeddings import EMBEDDINGS, dense_embeddings
from .expert_names import (
    ExpertLayout,
    by_gptqmodel,
    default_layout,
    expert_layout,
    expert_renaming,
    layer_names,
    renamed,
)
from .files import (
    INDEX,
    SETTINGS_FILES,
    STANDARD_FILES,
    TGI_TENSORS,
    checkpoint_files,
    embedded_settings,
    indexed_files,
    read_json,
    read_settings,
    settings_in,
)
from .foreign import STORED_PARTS, ForeignLayer, as_gptq, settings_of
from .gguf_blocks import EXACT_TYPES, read_blocks
from .gguf_header import check_header
from .headers import Manifest, TensorFile, TensorInfo, read_manifest, read_tensor
from .layer_specs import claimed_group_size, quantized_modules, resolve_specs
from .stored_tensors import StoredSpec, check_planes, encode, read_packed, read_quantized, resolve
from .weight import PackedWeight, QuantizedWeight, WeightSpec, selected, side_by_side
from .writer import Shards, write_checkpoint

__all__ = [
    "EMBEDDINGS", "EXACT_TYPES", "INDEX", "SETTINGS_FILES", "STANDARD_FILES", "STORED_PARTS", "TGI_TENSORS",
    "ExpertLayout", "ForeignLayer", "Manifest", "PackedWeight", "QuantizedWeight", "Shards", "StoredSpec", "TensorFile",
    "TensorInfo", "WeightSpec", "as_gptq", "by_gptqmodel", "check_header", "check_planes", "checkpoint_files",
    "claimed_group_size", "default_layout", "dense_embeddings", "embedded_settings", "encode", "expert_layout",
    "expert_renaming", "indexed_files", "layer_names", "quantized_modules", "read_blocks", "read_json", "read_manifest",
    "read_packed", "read_quantized", "read_settings", "read_tensor", "renamed", "resolve", "resolve_specs", "selected",
    "settings_in", "settings_of", "side_by_side", "write_awq", "write_checkpoint", "write_compressed_tensors",
]  # fmt: skip
