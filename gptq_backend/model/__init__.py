"""Walking through a model: its structure, what its layers see, and where its tensors lie."""

from .calibration import (
    check_fits,
    held_out_windows,
    make_batches,
    require_sequences,
    sample_windows,
    split_windows,
    tokenize,
)
from .calibration_choice import Selection, select, sketch
from .progress import Progress
from .structure import (
    BlockNames,
    Structure,
    evaluating,
    find_blocks,
    find_structure,
    is_linear,
    linear_shapes,
    replace_module,
)

__all__ = [
    "BlockNames", "Progress", "Selection", "Structure", "check_fits", "evaluating", "find_blocks", "find_structure",
    "held_out_windows", "is_linear", "linear_shapes", "make_batches", "replace_module", "require_sequences",
    "sample_windows", "select", "sketch", "split_windows", "tokenize",
]  # fmt: skip
