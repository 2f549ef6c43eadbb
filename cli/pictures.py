"""Clips on disk and side by side: PNG and mp4 in and out, PSNR, comparison picture.

A clip is a uint8 array `(frames, height, width, 3)`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

GAIN = 4
"""Differences are shown this much brighter."""


def decode_png(data: bytes) -> np.ndarray:
    """One picture `(height, width, 3)`."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def write_mp4(file: Path, clip: np.ndarray, fps: int = 16) -> None:
    """Write an H.264 mp4 that browsers play."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = clip.shape[2], clip.shape[1], "yuv420p"
        for picture in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def read_mp4(file: Path) -> np.ndarray:
    """Decode every frame of a video."""
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over the whole clip; infinite when equal."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def comparison(first: np.ndarray, second: np.ndarray, labels: Sequence[str], columns: int = 6) -> Image.Image:
    """Rows: `first`, `second` and their difference, at `columns` moments spread over the clip. labels: two names."""
    moments = np.linspace(0, len(first) - 1, min(columns, len(first))).round().astype(int)
    difference = np.minimum(np.abs(first.astype(np.int16) - second) * GAIN, 255).astype(np.uint8)
    rows = [np.concatenate(list(clip[moments]), axis=1) for clip in (first, second, difference)]
    header = 16
    height, width = rows[0].shape[:2]
    picture = Image.new("RGB", (width, 3 * (height + header)), (24, 24, 28))
    draw = ImageDraw.Draw(picture)
    for index, (row, label) in enumerate(zip(rows, (*labels, f"difference x {GAIN}"), strict=True)):
        top = index * (height + header)
        draw.text((4, top + 2), label, fill=(230, 230, 230))
        picture.paste(Image.fromarray(row), (0, top + header))
    return picture
