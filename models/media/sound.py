"""Sound: samples in memory, and their stream in a file."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import av
from torch import Tensor

LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}  # by the number of channels


@dataclass(frozen=True)
class Sound:
    """samples: float32 `(channels, samples)` in -1..1; 1, 2, 6 or 8 channels. rate: samples a second."""

    samples: Tensor
    rate: int


class SoundWriter:
    """Encodes sound into a stream in step with the frames, so that a file can be played while it is read. rate: frames a second."""

    def __init__(self, container: Any, stream: Any, sound: Sound, rate: Fraction) -> None:
        self.container, self.stream, self.sound, self.rate = container, stream, sound, rate
        self.done = 0  # samples

    def until(self, frames: int) -> None:
        """Up to where so many frames end."""
        stop = min(ceil(frames * self.sound.rate / self.rate), self.sound.samples.shape[1])
        if stop > self.done:
            part = self.sound.samples[:, self.done : stop].float().cpu().contiguous().numpy()
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=LAYOUTS[len(part)])
            frame.sample_rate, frame.pts, frame.time_base = self.sound.rate, self.done, Fraction(1, self.sound.rate)
            self.container.mux(self.stream.encode(frame))
            self.done = stop

    def finish(self) -> None:
        self.container.mux(self.stream.encode(None))
