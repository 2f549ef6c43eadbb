"""The picture of the truth table: PSNR against the work in the window, a line a method."""

from __future__ import annotations

import colorsys
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 960, 600
LEFT, TOP, RIGHT, BOTTOM = 60, 20, 740, 550
"""Of the plot; names stand to its right."""
FINE = 3  # drawn larger, then reduced: lines are smooth


def draw(table: list[dict[str, Any]], file: Path) -> None:
    """A line for each method of `quality.summarise`, best at its most work first. Hollow points: the same recipe with the tail."""
    rows = sorted((row for row in table if row["mode"] is not None), key=lambda row: row["window_work"])
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["method"], []).append((row["window_work"], row["psnr"]))
    recipes = sorted({method.partition("+")[0] for method in lines})
    most = math.ceil(20 * rows[-1]["window_work"])  # twentieths
    low, high = 2 * math.floor(min(row["psnr"] for row in rows) / 2), 2 * math.ceil(max(row["psnr"] for row in rows) / 2)

    picture = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), "white")
    pen = ImageDraw.Draw(picture)

    def place(work: float, psnr: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * work * 20 / most, BOTTOM - (BOTTOM - TOP) * (psnr - low) / max(high - low, 1)

    def line(points: list[tuple[float, float]], colour: str, width: int) -> None:
        pen.line([(FINE * x, FINE * y) for x, y in points], fill=colour, width=width * FINE)

    def text(x: float, y: float, words: str, anchor: str) -> None:
        pen.text((FINE * x, FINE * y), words, fill="black", font=ImageFont.load_default(13 * FINE), anchor=anchor)

    for psnr in range(low, high + 1, 2):
        line([place(0, psnr), place(most / 20, psnr)], "#e0e0e0", 1)
        text(LEFT - 8, place(0, psnr)[1], str(psnr), "rm")
    for tick in range(most + 1):
        line([place(tick / 20, low), place(tick / 20, high)], "#e0e0e0", 1)
        text(place(tick / 20, low)[0], BOTTOM + 14, f"{tick / 20:.2f}", "mm")
    text((LEFT + RIGHT) / 2, HEIGHT - 16, "work in steps and blocks that may be sparse, of dense", "mm")
    text(LEFT + 8, TOP + 12, "PSNR against the dense clip, dB", "lm")
    for number, (method, found) in enumerate(sorted(lines.items(), key=lambda item: -item[1][-1][1])):
        recipe, plus, _ = method.partition("+")
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(recipes.index(recipe) / len(recipes), 0.85, 0.75))
        colour, y = f"#{red:02x}{green:02x}{blue:02x}", TOP + 12 + 20 * number
        for points in ([place(*point) for point in found], [(RIGHT + 20, y), (RIGHT + 44, y)]):
            line(points, colour, 2)
            for x, height in points:
                box = [FINE * (x - 4), FINE * (height - 4), FINE * (x + 4), FINE * (height + 4)]
                pen.ellipse(box, fill="white" if plus else colour, outline=colour, width=2 * FINE)
        text(RIGHT + 56, y, method, "lm")
    picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(file, optimize=True)
