"""Merging what an adapter learned into a GPTQ checkpoint: a dense checkpoint, or a GPTQ checkpoint again."""

from .adapter import Adapter
from .base import Base
from .comparison import plainly_rounded, with_adapter
from .merge import MergeReport, merge_adapter

__all__ = ["Adapter", "Base", "MergeReport", "merge_adapter", "plainly_rounded", "with_adapter"]
