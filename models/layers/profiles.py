"""Colours of a file's ICC profile as sRGB, which is what pictures are here and in ComfyUI. Through Pillow's Little CMS, 8 bits a channel."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

Convert = Callable[[np.ndarray], np.ndarray]
"""uint8 `(height, width, 1 or 3)`, as many channels as the profile is for -> uint8 `(height, width, 3)` in sRGB."""


@lru_cache(maxsize=8)  # every layer of an OpenRaster file may carry the same one
def to_srgb(profile: bytes, channels: int) -> tuple[Convert | None, str]:
    """What converts pixels of 1 (grey) or 3 (RGB) channels, None where they are sRGB already, and the profile's own name.

    Relative colorimetric with black point compensation, as Photoshop by default. Raises ValueError for a profile that cannot be used.
    """
    mode = "L" if channels == 1 else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:  # TypeError: of Pillow, for a profile that it cannot open
        raise ValueError("its colour profile is damaged, or for other colours") from error

    def convert(pixels: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)
        return np.asarray(ImageCms.applyTransform(picture, transform))

    steps = np.arange(0, 256, 17, dtype=np.uint8)
    colours = np.stack(np.meshgrid(*[steps] * channels), -1).reshape(1, -1, channels)
    same = np.abs(convert(colours).astype(int) - colours).max() <= 1  # what rounding may do: the many that are sRGB under some name
    return (None if same else convert), name
