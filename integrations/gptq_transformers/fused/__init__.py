"""Decoder layers in few calls on a CPU: recognised by their modules, admitted by a comparison."""

from .admit import fuse_layers, remove_fused

__all__ = ["fuse_layers", "remove_fused"]
