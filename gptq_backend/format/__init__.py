"""What lies in a checkpoint's files, and the one value that a packed weight is in memory."""

from . import packing
from .expert_names import ExpertLayout, default_layout, expert_layout, expert_renaming, layer_names, renamed
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
from .headers import Manifest, TensorFile, TensorInfo, read_manifest, read_tensor
from .layer_specs import claimed_group_size, quantized_modules, resolve_specs
from .weight import LinearSpec, QuantizedWeight, decode, encode, resolve, unpack_codes, unpack_zeros
from .writer import Shards, write_checkpoint

__all__ = [
    "INDEX",
    "SETTINGS_FILES",
    "STANDARD_FILES",
    "TGI_TENSORS",
    "ExpertLayout",
    "LinearSpec",
    "Manifest",
    "QuantizedWeight",
    "Shards",
    "TensorFile",
    "TensorInfo",
    "checkpoint_files",
    "claimed_group_size",
    "decode",
    "default_layout",
    "embedded_settings",
    "encode",
    "expert_layout",
    "expert_renaming",
    "indexed_files",
    "layer_names",
    "packing",
    "quantized_modules",
    "read_json",
    "read_manifest",
    "read_settings",
    "read_tensor",
    "renamed",
    "resolve",
    "resolve_specs",
    "settings_in",
    "unpack_codes",
    "unpack_zeros",
    "write_checkpoint",
]
