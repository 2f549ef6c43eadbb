"""The video encoders of FFmpeg that are used, and how."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Encoder:
    """How an encoder of FFmpeg is set up. All look a few frames ahead at most: frames that wait in an encoder are memory.

    reordered: how many frames at most a frame is decoded before it is shown. smallest: pixels a side, below which the encoder writes beyond
    its own memory and ends the process, or hangs.
    """

    crf: int
    options: dict[str, str]
    reordered: int = 0
    smallest: int = 1


ENCODERS = {
    # cpu-independent: its faster mbtree reads memory that nobody wrote, so that the same frames made different files.
    "libx264": Encoder(16, {"preset": "medium", "x264-params": "rc-lookahead=4:sync-lookahead=0:threads=3:bframes=2:ref=2:cpu-independent=1"}, 2),
    "libx265": Encoder(17, {"preset": "medium", "x265-params": "rc-lookahead=5:bframes=3:ref=2:frame-threads=1:log-level=error"}, 2, smallest=64),
    "libvpx-vp9": Encoder(18, {"deadline": "good", "cpu-used": "3", "lag-in-frames": "8", "row-mt": "1"}),
    "libsvtav1": Encoder(20, {"preset": "7"}, smallest=64),
    "libaom-av1": Encoder(18, {"cpu-used": "6", "lag-in-frames": "8", "row-mt": "1"}),
}
# First choices for 8 bit and for more, by container.
PREFERRED = {
    ("mp4", False): ("libx264", "libopenh264"),
    ("mp4", True): ("libx265", "libx264", "libsvtav1", "libaom-av1"),
    ("webm", False): ("libvpx-vp9", "libsvtav1", "libaom-av1"),
    ("webm", True): ("libvpx-vp9", "libsvtav1", "libaom-av1"),
}
# By whether they have more than 8 bits a channel; the first that the encoder takes.
PIXEL_FORMATS = {
    False: ("yuv420p", "yuv422p", "yuv444p"),
    True: ("yuv420p10le", "yuv422p10le", "yuv444p10le", "yuv420p12le", "yuv422p12le", "yuv444p12le"),
}
