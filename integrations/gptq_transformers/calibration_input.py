"""What a caller may pass as calibration data, and the tokenizer for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from gptq_backend.errors import CalibrationError
from gptq_backend.model import require_sequences, sample_windows, tokenize

from .auto_calibration import AUTO
from .errors import first_line
from .model_files import local_file

logger = logging.getLogger(__name__)

_TRIFLES = 8  # tokens that made-up tokenizers have beside special ones, such as a space


def given(calibration: Any) -> Any:
    """``calibration`` as a text, a list, or None: checked before anything large is read.

    Raises:
        CalibrationError: it is the path of a file, one flat sequence of token ids, or no sequence.
    """
    if isinstance(calibration, os.PathLike) or _names_a_file(calibration):
        raise CalibrationError(f"calibration is the path {calibration}; pass its text, e.g. with read_text()")
    if calibration is None or isinstance(calibration, str):
        return calibration
    try:
        samples = [calibration] if isinstance(calibration, Mapping) else list(calibration)
    except TypeError:
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}; expected text, a list of texts, or a list of token id "
            "sequences"
        ) from None
    if samples and all(map(_names_a_file, samples)):
        raise CalibrationError(f"calibration is the path {samples[0]} in a list; pass its text, e.g. with read_text()")
    require_sequences(samples)
    return samples


def is_text(calibration: Any) -> bool:
    """Whether what :func:`given` returned needs a tokenizer."""
    return isinstance(calibration, str) or (bool(calibration) and isinstance(calibration[0], str))


def token_ids(calibration: Any, tokenizer: Any, seqlen: int | None, samples: int | None, seed: int) -> Any:
    """Samples of token ids from what :func:`given` returned; None stays None.

    Raises:
        CalibrationError: too little text, or ``seqlen`` for token ids.
    """
    if calibration is None:
        return None
    if is_text(calibration):
        return tokenize(calibration, tokenizer, seqlen, samples, seed)
    if seqlen is not None:
        raise CalibrationError(f"seqlen={seqlen} cuts texts, but calibration is token ids; cut them yourself")
    return sample_windows(calibration, samples, seed)


def load_tokenizer(path: str | Path, required: bool, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's folder; None if none can be made, unless it is ``required``.

    Raises:
        CalibrationError: it is, and cannot be made.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        reason = "its vocabulary is missing" if _is_made_up(tokenizer, path) else None
    except Exception as error:  # of transformers' tokenizers, which raise most kinds where their files are missing
        tokenizer, reason = None, first_line(error)
    if reason is None:
        return tokenizer
    if required:
        raise CalibrationError(
            f"no tokenizer could be loaded from {path} ({reason}); copy the tokenizer's files of the original model "
            "there, or in Python pass tokenizer= or token ids"
        )
    if local_file(path, "tokenizer.json") is not None:
        logger.warning("the tokenizer of %s cannot be loaded (%s), and is not copied", path, reason)
    return None


def _is_made_up(tokenizer: Any, path: str | Path) -> bool:
    """Whether transformers 5 made a tokenizer of nearly nothing but special tokens, for want of its files."""
    if len(tokenizer) > len(tokenizer.all_special_tokens) + _TRIFLES:
        return False
    names = {"tokenizer.json", *getattr(tokenizer, "vocab_files_names", {}).values()}
    return all(local_file(path, name) is None for name in names)


def _names_a_file(text: Any) -> bool:
    return isinstance(text, str) and text != AUTO and len(text) < 4096 and os.path.isfile(text)
