"""Checkpoints of one format made from those of another, a layer at a time, with proof of what it cost."""

from .convert import ConvertReport, convert, is_gguf
from .targets import TARGETS

__all__ = ["TARGETS", "ConvertReport", "convert", "is_gguf"]
