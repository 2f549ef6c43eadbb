"""One frame of the built-in model's clip, dense and in the modes of *Accelerate*, side by side, with their differences.

    python bench/error_picture.py [--frame 20] [--out web/docs/accelerate_modes.jpg]

`tessera` must be importable; needs ComfyUI. Prints what each run asked for, measured and computed; the picture holds the same figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tessera.cli.comfy_server import HOW_TO_GET, PACK, ComfyServer, find_comfy
from tessera.cli.demo import WORKFLOW, variants, with_savers
from tessera.cli.pictures import GAIN, decode_png, psnr

MODES = ("quality", "balanced", "fast")
SCALE = 2
LINE = 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frame", type=int, default=20, help="which of the 33 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=PACK / "web" / "docs" / "accelerate_modes.jpg")
    options = parser.parse_args()
    comfy = find_comfy()
    if comfy is None:
        sys.exit(f"bench/error_picture.py needs ComfyUI: {HOW_TO_GET}")
    clips, labels = {}, {}
    with ComfyServer(comfy, arguments=["--use-pytorch-cross-attention"]) as server:
        for name, graph in graphs():
            outputs = server.run(graph).outputs
            clips[name] = np.stack([decode_png(server.fetch(file)) for file in outputs["frames"]["images"]])
            report = outputs["9"]["tessera"][0]
            print(name, outputs["9"]["text"][0])
            labels[name] = list(lines(name, report, psnr(clips["dense"], clips[name])))
            print(*labels[name], sep="\n")
    picture(clips, labels, options.frame).save(options.out, quality=88)


def graphs() -> Iterator[tuple[str, dict[str, Any]]]:
    """The text-to-video workflow, all dense, and with *Accelerate* in the place of *Sparse Attention*."""
    workflow = with_savers(json.loads(WORKFLOW.read_text()))
    yield next(variants(workflow))
    for mode in MODES:
        accelerate = {"class_type": "TesseraAccelerate", "inputs": {"model": workflow["3"]["inputs"]["model"], "mode": mode, "min_tokens": 0}}
        yield mode, {**workflow, "3": accelerate}


def lines(name: str, report: dict[str, Any], against_dense: float) -> Iterator[str]:
    yield name
    if report["error"] is not None:
        yield f"error {report['error']:.1%}, asked {report['asked_error']:.0%}"
        yield f"work {report['work']:.2f}, density {report['density']:.2f}"
        yield f"clip: {against_dense:.1f} dB from dense"


def picture(clips: dict[str, np.ndarray], labels: dict[str, list[str]], frame: int) -> Image.Image:
    """A column for each clip: its frame, its difference from the dense one, brighter, and its figures."""
    dense = clips["dense"][frame]
    height, width = (SCALE * size for size in dense.shape[:2])
    whole = Image.new("RGB", (len(clips) * width, 2 * height + 5 * LINE), (24, 24, 28))
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(14)
    for column, (name, clip) in enumerate(clips.items()):
        left = column * width
        difference = np.minimum(np.abs(clip[frame].astype(np.int16) - dense) * GAIN, 255).astype(np.uint8)
        for top, pixels in ((0, clip[frame]), (height, difference)):
            whole.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC), (left, top))
        if name == "dense":
            draw.text((left + 6, height + 4), f"difference from dense x {GAIN}", fill=(170, 170, 170), font=font)
        for number, line in enumerate(labels[name]):
            draw.text((left + 6, 2 * height + 6 + LINE * number), line, fill=(230, 230, 230), font=font)
    return whole


if __name__ == "__main__":
    main()
