"""Calibration samples of token ids become all that a model is called with: what its decoder reads, pictures, sound."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import FEATURE_EXTRACTOR_MAPPING, AutoProcessor, PreTrainedModel

from gptq_backend import CalibrationError

from .errors import first_line
from .made_media import picture, sound

logger = logging.getLogger(__name__)

_TEXT = {"input_ids", "attention_mask"}
_DECODED = {"decoder_input_ids", "decoder_inputs_embeds"}
_RAW = {"text", "images", "audio"}  # what a processor takes, of a sample that is not tensors yet
_SHARE = 8  # one sample with a picture or a sound for so many of text, of a model that needs none
_MOST = 16  # such samples
_PROMPT = 64  # tokens of text beside a picture or a sound
_SOUNDS = ("input_features", "input_values")  # what models call them; pictures have several names


def whole_samples(
    samples: Sequence[Any],
    model: PreTrainedModel,
    source: str | Path,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    added: bool = True,
) -> list[Any]:
    """``samples`` with what ``model`` wants beside token ids; mappings that say more than the ids stay as they are, but
    for ``labels``: those of an encoder-decoder become what its decoder reads to predict them.

    - Samples of ``text``, ``images`` and ``audio`` go through the processor in ``source`` or, if there is none, through
      ``tokenizer``, which may also be a processor.
    - An encoder-decoder's decoder reads the same text, shifted by its start token. Padding is cut off.
    - A model whose main input is no text gets a picture or a sound with each sample, made here and prepared by the
      processor, or of the sizes in the model's configuration if there is none.
    - Of a model that can see or hear beside reading, a few samples with pictures or sounds are ``added``, if its
      processor is there and no sample has more than text.

    Raises:
        CalibrationError: the model needs inputs that cannot be made here, or its processor does not take a sample.
    """
    takes = inspect.signature(model.forward).parameters
    main: str = getattr(model, "main_input_name", "input_ids")
    decodes = "decoder_input_ids" in takes and getattr(model.config, "is_encoder_decoder", False)
    found: list[Any] = []
    texts: list[Tensor] = []
    only_text = True
    media = functools.cache(lambda: _Media(model, source, tokenizer, trust_remote_code))
    for number, sample in enumerate(samples):
        fields = dict(sample) if isinstance(sample, Mapping) else {"input_ids": sample}
        if any(fields.get(key) is not None for key in _RAW):
            sample = fields = media().prepared(fields, number)
        given = {key for key, value in fields.items() if value is not None}
        rows = _without_padding(fields) if given <= _TEXT else None
        texts += rows or []
        only_text &= rows is not None
        if rows is not None and main != "input_ids" and main in takes:
            found += [media().with_main_input(ids, main, number + 1000 * row) for row, ids in enumerate(rows)]
        elif rows is not None and decodes:
            found += [{"input_ids": ids, "decoder_input_ids": _shifted(ids, _start(model.config))} for ids in rows]
        elif decodes and "labels" in given and not given & _DECODED:
            found.append(_reading_labels(fields, model))
        else:
            found.append(sample)
    if added and only_text and main == "input_ids" and {"pixel_values", *_SOUNDS} & takes.keys():
        found += media().added(texts[::_SHARE][:_MOST])
    return found


def _without_padding(fields: Mapping[str, Any]) -> list[Tensor] | None:
    """The token ids [T] of each sequence that has some; None if they are none, which ``make_batches`` refuses."""
    try:
        ids = torch.atleast_2d(torch.as_tensor(fields.get("input_ids")))
        mask = fields.get("attention_mask")
        kept = torch.ones_like(ids) if mask is None else torch.atleast_2d(torch.as_tensor(mask))
        return [row[real != 0] for row, real in zip(ids, kept, strict=True) if real.any()]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None


def _reading_labels(fields: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The sample with what the decoder reads to predict ``labels``: the model would make the same of them, but tell
    nobody where their padding (-100) is.
    """
    labels = torch.atleast_2d(torch.as_tensor(fields["labels"]))
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    pad = getattr(model.config, "pad_token_id", None) or 0
    ids = shift(labels) if shift else _shifted(labels.masked_fill(labels == -100, pad), _start(model.config))
    others = {key: value for key, value in fields.items() if key != "labels" and value is not None}
    return {"decoder_attention_mask": (labels != -100).long(), **others, "decoder_input_ids": ids}


def _shifted(ids: Tensor, first: int) -> Tensor:
    return torch.cat([torch.full_like(ids[..., :1], first), ids[..., :-1]], -1)


def _start(config: Any) -> int:
    """The token with which a decoder starts."""
    own = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    return next((token for token in own if isinstance(token, int)), 0)


class _Media:
    """Pictures and sounds as a model takes them."""

    def __init__(self, model: PreTrainedModel, source: str | Path, tokenizer: Any, trust_remote_code: bool) -> None:
        self.model, self.takes = model, inspect.signature(model.forward).parameters
        self.processor, self.reason = tokenizer, "it has no processor"
        main = getattr(model, "main_input_name", "input_ids")
        asks = {"pixel_values", main, *_SOUNDS}.intersection(self.takes) - _TEXT
        if not _is_processor(tokenizer) and (asks or tokenizer is None):
            try:
                self.processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
            except Exception as error:  # of the code of processors, which needs packages that may not be there
                self.reason = first_line(error)

    def prepared(self, sample: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A sample of text, images or sound as the processor, or a tokenizer in its place, returns it."""
        if self.processor is None:
            raise CalibrationError(
                f"calibration sample {number} has text, images or audio, but there is no processor for them "
                f"({self.reason}); pass tokenizer=, or tensors"
            )
        try:
            batch = self.processor(**sample, return_tensors="pt")
        except Exception as error:  # of the code of processors
            name = type(self.processor).__name__
            raise CalibrationError(
                f"calibration sample {number} cannot be prepared by {name}: {first_line(error)}"
            ) from error
        return {key: value for key, value in batch.items() if key in self.takes}

    def with_main_input(self, ids: Tensor, main: str, number: int) -> dict[str, Any]:
        """A sample of a model that reads pictures or sound first, and the text ``ids`` [T], if any."""
        ids = ids[None]
        text: dict[str, Any] = {}
        if "input_ids" in self.takes:
            if (sample := self.beside_text(ids[0], number)) is not None:
                return sample
            text = {"input_ids": ids}
        if "decoder_input_ids" in self.takes and getattr(self.model.config, "is_encoder_decoder", not text):
            config = self.model.config.get_text_config(decoder=True)
            limit = getattr(config, "max_target_positions", None) or getattr(config, "max_position_embeddings", None)
            text["decoder_input_ids"] = _shifted(ids, _start(self.model.config))[:, :limit]
        return {main: self.of_processor(main, number), **text}

    def of_processor(self, main: str, number: int) -> Tensor:
        """The main input, a picture or a sound; of the processor's part for it, or a part alone."""
        heard = main in _SOUNDS
        tool = getattr(self.processor, "feature_extractor" if heard else "image_processor", None)
        if tool is None and main in getattr(self.processor, "model_input_names", ()):
            tool = self.processor
        if tool is None:
            return _of_config(self.model, main, number, self.reason)
        if heard:
            rate = getattr(tool, "sampling_rate", 16_000)
            return tool(sound(number, rate), sampling_rate=rate, return_tensors="pt")[main]
        return tool(images=picture(number), return_tensors="pt")[main]

    def added(self, texts: Sequence[Any]) -> list[Any]:
        """Samples of a picture or a sound and one of ``texts``; [] with a word if none can be made."""
        if not _is_processor(self.processor):
            return []
        found = [self.beside_text(ids, number) for number, ids in enumerate(texts)]
        made = [sample for sample in found if sample is not None]
        if made:
            logger.info("%d calibration samples have a picture or a sound made for them", len(made))
        else:
            logger.warning("calibration goes on text alone, without pictures or sounds: %s", self.reason)
        return made

    def beside_text(self, ids: Any, number: int) -> dict[str, Any] | None:
        """A picture or a sound, and the text of ``ids``, by the processor; None if it makes none."""
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None:
            return None
        text = tokenizer.decode(torch.as_tensor(ids).flatten()[:_PROMPT], skip_special_tokens=True)
        for kind, make in _KINDS.items():
            if not hasattr(self.processor, kind):
                continue
            for prompt in self.prompts(kind, text):
                try:
                    batch = self.processor(text=[prompt], return_tensors="pt", **make(self.processor, number))
                except Exception as error:  # of the code of processors
                    self.reason = first_line(error)
                    continue
                sample = {key: value for key, value in batch.items() if key in self.takes}
                if self.marked(kind, sample):
                    return sample
        return None

    def prompts(self, kind: str, text: str) -> Iterator[str]:
        """The text with the mark of a picture or a sound, as the processor may want it."""
        name = "image" if kind == "image_processor" else "audio"
        try:
            content = [{"type": name}, {"type": "text", "text": text}]
            yield self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception as error:  # no template, or one that takes other messages
            self.reason = first_line(error)
        for mark in ("boi_token", f"{name}_token"):
            if isinstance(token := getattr(self.processor, mark, None), str):
                yield f"{token}{text}"
        yield text

    def marked(self, kind: str, sample: Mapping[str, Tensor]) -> bool:
        """Whether the ids have a place for it, of a model that looks for one."""
        name = "image" if kind == "image_processor" else "audio"
        keys = (f"{name}_token_id", f"{name}_token_index")
        mark = next((token for key in keys if (token := getattr(self.model.config, key, None)) is not None), None)
        return mark is None or bool((sample["input_ids"] == mark).any())


def _is_processor(tool: Any) -> bool:
    """Whether it prepares text together with pictures or sound."""
    return any(hasattr(tool, name) for name in _KINDS)


def _picture(processor: Any, number: int) -> dict[str, Any]:
    return {"images": [picture(number)]}


def _sound(processor: Any, number: int) -> dict[str, Any]:
    rate = getattr(processor.feature_extractor, "sampling_rate", 16_000)
    return {"audio": [sound(number, rate)], "sampling_rate": rate}


_KINDS = {"image_processor": _picture, "feature_extractor": _sound}  # parts of a processor


def _of_config(model: PreTrainedModel, main: str, number: int, reason: str) -> Tensor:
    """A picture or the spectrum of a sound as large as the configuration says, normalized; or as a processor with the
    usual settings of such models makes it.

    Raises:
        CalibrationError: it does not say.
    """
    config: Any = model.config
    if main == "input_values":
        return torch.from_numpy(sound(number))[None]
    wave = torch.from_numpy(sound(number))
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if main == "input_features" and bins and frames:
        spectrum = torch.stft(wave, 400, 160, window=torch.hann_window(400), return_complex=True).abs()
        spectrum = torch.nn.functional.interpolate(spectrum.clamp(1e-5).log10()[None, None], (bins, 2 * frames))[0]
        return (spectrum - spectrum.mean()) / spectrum.std()
    if main in _SOUNDS and (kind := FEATURE_EXTRACTOR_MAPPING.get(type(config), None)) is not None:
        try:
            return kind()(sound(number), sampling_rate=16_000, return_tensors="pt")[main]
        except Exception as error:  # of the code of processors
            reason = first_line(error)
    parts = [getattr(config, name, None) for name in ("encoder", "vision_config")]
    seen = next((part for part in parts if hasattr(part, "image_size")), config)
    size = getattr(seen, "image_size", None)
    if main != "pixel_values" or size is None:
        raise CalibrationError(
            f"{type(model).__name__} needs {main}, and its processor cannot be loaded ({reason}); copy the processor's "
            "files beside the model, pass samples with all that it needs, or calibration=None, which rounds to nearest"
        )
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.from_numpy(np.array(picture(number).resize((width, height))))
    channels = getattr(seen, "num_channels", 3)
    return ((image.permute(2, 0, 1).float() - 127) / 64)[None, :channels]
