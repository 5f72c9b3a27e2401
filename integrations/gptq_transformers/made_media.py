"""Pictures and sounds to calibrate on: made here from a seed, so that they need no licence and no download."""

from __future__ import annotations

from typing import Any

import numpy as np

from gptq_backend.errors import CalibrationError

_SIZE = (288, 384)  # of a picture: height, width
_SECONDS = 4


def picture(seed: int) -> Any:
    """A PIL image with what photographs have: soft light, edges, texture and a few colours.

    Raises:
        CalibrationError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("pictures to calibrate on need Pillow; pip install pillow, or pass your own") from error
    random = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, _SIZE[0]), np.linspace(0, 1, _SIZE[1]), indexing="ij")
    corners = random.uniform(40, 215, (2, 2, 3))
    image = (1 - y)[..., None] * ((1 - x)[..., None] * corners[0, 0] + x[..., None] * corners[0, 1])
    image += y[..., None] * ((1 - x)[..., None] * corners[1, 0] + x[..., None] * corners[1, 1])
    for _ in range(12):
        colour, (cx, cy) = random.uniform(0, 255, 3), random.uniform(0, 1, 2)
        width, height = random.uniform(0.03, 0.25, 2)
        if random.random() < 0.5:
            inside = ((x - cx) / width) ** 2 + ((y - cy) / height) ** 2 < 1
        else:
            inside = (abs(x - cx) < width) & (abs(y - cy) < height)
        image[inside] = 0.8 * colour + 0.2 * image[inside]
    frequency, angle = random.uniform(20, 80), random.uniform(0, np.pi)
    stripes = np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle)))
    image += 12 * stripes[..., None] + random.normal(0, 6, image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def sound(seed: int, rate: int = 16_000) -> np.ndarray:
    """float32 [samples], a few seconds in the manner of speech: syllables of a gliding voice, breath and pauses."""
    random = np.random.default_rng(seed)
    time = np.arange(_SECONDS * rate) / rate
    pitch = random.uniform(90, 220) * (1 + 0.2 * np.sin(2 * np.pi * random.uniform(0.2, 0.8) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    formants = random.uniform(300, 3000, 3)
    voice = sum(np.exp(-(((k * 150 - formants) / 400) ** 2)).sum() * np.sin(k * phase) / k**0.5 for k in range(1, 25))
    syllables = np.clip(np.sin(2 * np.pi * random.uniform(2, 5) * time + random.uniform(0, 6)), 0, 1)
    wave = syllables * voice + 0.05 * random.normal(size=time.shape)
    return (0.3 * wave / abs(wave).max()).astype(np.float32)
