"""Odd files of every kind that a reader of weights, arrays or pictures takes: whole ones, broken at random.

python tests/broken_files.py 5000    (with PYTHONPATH to a folder in which `tessera` is this repository) breaks so many and tells what came
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from tessera.cli import hyperspectral
from tessera.cli.offload_plan import lines
from tessera.models.errors import FileError
from tessera.models.layers import transparent_vae
from tessera.models.layers.regions import Regions, layer_embedding
from tessera.models.media.picture_files import fitted, read_picture, write_picture
from tessera.models.upscale import convert_essaformer, patch_adapter
from tessera.models.upscale.catanet import CATANet
from tessera.models.upscale.essaformer import ESSAformer
from tessera.models.upscale.networks import read_network
from tessera.models.weight_files import read_safetensors

# What tells of a program and not of a file.
OF_PYTHON = re.compile(
    r"Traceback|\b[A-Za-z.]+(Error|Exception|Warning|Interrupt)\b|NoneType|object has no|has no attribute|subscriptable|to unpack|out of range"
    r"|object is not|codec can't|positional|recursion depth|invalid literal|required argument|deserializ|struct |<class|<function|0x[0-9a-f]{6}"
)


@dataclass(frozen=True)
class Reader:
    """seeds: whole files, by their names. load: reads one to the end, so that what is wrong with it is found."""

    seeds: Callable[[], dict[str, bytes]]
    load: Callable[[Path], Any]


def transformer() -> bytes:
    return save({f"blocks.{i}.{name}.weight": torch.zeros(16, 16) for i in range(4) for name in ("q", "k")} | {"head.weight": torch.zeros(4, 16)})


def saved(state: Any, packed: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=packed)
    return file.getvalue()


def catanet() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in CATANet(2).half().state_dict().items()}


def essaformer() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in ESSAformer(5, 4, 2).state_dict().items()}


def adapter() -> bytes:
    config = patch_adapter.Config(4, 8, 2, 32, 2, 1, 1)
    state = patch_adapter.PatchAdapter(config).state_dict()
    state |= {"lora.blocks.0.q.lora_up.weight": torch.zeros(8, 2), "lora.blocks.0.q.lora_down.weight": torch.zeros(2, 8)}
    return save({name: value.clone() for name, value in state.items()}, patch_adapter.metadata(config))


def decoder() -> bytes:
    network = transparent_vae.TransparentDecoder(4, 64, 2, 32, tail=True, layer_spacing=4)
    return save({name: value.contiguous() for name, value in transparent_vae.published(network).items()})


def cubes() -> dict[str, bytes]:
    cube = np.arange(5 * 6 * 7, dtype=np.uint16).reshape(5, 6, 7)
    files = {}
    for name, array in (("cube.npy", cube), ("last.npy", cube.astype(">f4").transpose(2, 1, 0)), ("bytes.npy", cube.astype(np.int8))):
        file = io.BytesIO()
        np.save(file, array)
        files[name] = file.getvalue()
    return files


def tiffs() -> dict[str, bytes]:
    import tifffile

    cube = np.arange(5 * 16 * 16, dtype=np.uint16).reshape(5, 16, 16)
    options: dict[str, dict[str, Any]] = {
        "plain": {"photometric": "minisblack", "planarconfig": "separate"},
        "deflate": {"photometric": "minisblack", "compression": "deflate", "predictor": 2},
        "tiled": {"photometric": "minisblack", "tile": (16, 16)},
        "imagej": {"imagej": True},
        "ome": {"ome": True, "photometric": "minisblack"},
        "big": {"bigtiff": True, "photometric": "minisblack", "byteorder": ">"},
    }
    files = {}
    for name, option in options.items():
        file = io.BytesIO()
        tifffile.imwrite(file, cube, **option)
        files[f"{name}.tif"] = file.getvalue()
    return files


def pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    codes = (np.mgrid[:24, :32].sum(0)[..., None] * [2, 3, 4, 5] + rng.integers(0, 9, (24, 32, 4))).clip(0, 255).astype(np.uint8)
    colour, alpha = Image.fromarray(codes[..., :3]), Image.fromarray(codes)
    exif = Image.Exif()
    exif[274], exif[282], exif[315] = 6, 72.0, "author"
    exif.get_ifd(0x8769)[0xA002] = 32
    profile = b"profile" * 20
    whole: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.png": (colour, {"exif": exif}),
        "alpha.png": (alpha, {}),
        "grey.png": (colour.convert("L"), {"icc_profile": profile}),
        "palette.png": (colour.convert("P"), {"transparency": 0}),
        "deep.png": (Image.fromarray(codes[..., 0].astype(np.uint16) * 257), {}),
        "moving.png": (colour, {"save_all": True, "append_images": [colour.rotate(180)]}),
        "rgb.jpg": (colour, {"exif": exif}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "progressive.jpg": (colour, {"progressive": True}),
        "alpha.webp": (alpha, {"lossless": True, "exif": exif}),
        "lossy.webp": (colour, {}),
        "rgb.tif": (colour, {"compression": "tiff_lzw"}),
        "alpha.tif": (alpha, {}),
        "deep.tif": (Image.fromarray(codes[..., 0].astype(np.uint16) * 257), {}),
        "rgb.gif": (colour, {"save_all": True, "append_images": [colour.rotate(180)]}),
        "rgb.bmp": (colour, {}),
        "rgb.ppm": (colour, {}),
        "rgb.tga": (alpha, {"compression": "tga_rle"}),
        "rgb.ico": (alpha, {}),
        "rgb.pcx": (colour, {}),
        "rgb.dds": (alpha, {}),
        "rgb.sgi": (colour, {}),
        "rgb.jp2": (colour, {}),
        "rgb.avif": (colour, {}),
    }
    files = {}
    for name, (image, options) in whole.items():
        if (kind := Image.registered_extensions().get(Path(name).suffix)) in Image.SAVE:
            file = io.BytesIO()
            image.save(file, kind, **options)
            files[name] = file.getvalue()
    return files


def _picture(path: Path) -> None:
    """Read and written, as `tessera upscale` does."""
    target = path.with_name("out.png")
    picture = read_picture(path)
    height, width = picture.pixels.shape[-2:]
    write_picture(target, fitted(picture, target, (width, height)))


def _adapter(path: Path) -> None:
    config, state, _ = patch_adapter.load(path)
    patch_adapter.PatchAdapter(config).load_state_dict(state)


def _decoder(path: Path) -> None:
    """As the nodes do."""
    state, _ = read_safetensors(path)
    try:
        transparent_vae.build(state)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from error


def _embedding(path: Path) -> None:
    state, _ = read_safetensors(path)
    try:
        layer_embedding(state, Regions(2, 2, ((0, 0, 2, 2),) * 3), 8)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from error


READERS = {
    "offload-plan": Reader(lambda: {"a.safetensors": transformer()}, lambda path: list(lines(path, 0.5, "RTX 3060", "1024x1024", None, None))),
    "weights": Reader(lambda: {"a.safetensors": transformer()}, lambda path: [value.clone() for value in read_safetensors(path)[0].values()]),
    "network": Reader(lambda: {"a.safetensors": save(catanet())}, lambda path: read_network(path).load(torch.device("cpu"))),
    "checkpoint": Reader(
        lambda: {"a.pth": saved({"params": catanet()}), "old.pth": saved(catanet(), packed=False), "small.pth": saved({"a": torch.zeros(3)})},
        lambda path: read_network(path).load(torch.device("cpu")),
    ),
    "adapter": Reader(lambda: {"a.safetensors": adapter()}, _adapter),
    "decoder": Reader(lambda: {"a.safetensors": decoder()}, _decoder),
    "embedding": Reader(lambda: {"a.safetensors": save({"layer_pe": torch.zeros(1, 5, 1, 1, 8)})}, _embedding),
    "ESSAformer": Reader(lambda: {"a.safetensors": save(essaformer())}, hyperspectral._network),
    "conversion": Reader(lambda: {"a.pth": saved({"epoch": 1, "model": essaformer()})}, convert_essaformer.read_checkpoint),
    "cube": Reader(cubes, hyperspectral._read),
    "TIFF": Reader(tiffs, lambda path: hyperspectral._read(path)[0].max()),
    "picture": Reader(pictures, _picture),
}


def broken(reader: str, numbers: range) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the files of these numbers: the same at each run, but for the addresses in checkpoints of old versions of torch."""
    torch.manual_seed(0)
    seeds = READERS[reader].seeds()
    for number in numbers:
        rng = random.Random(f"{reader} {number}")
        name = rng.choice(sorted(seeds))
        yield f"{number}_{name}", _broken(seeds[name], name, rng)


ODD_NUMBERS = (-1, 0, 1, 2, 3, 255, 10**6, 10**8, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 0.5, 1e308)
ODD = (*ODD_NUMBERS, None, True, "", "abc", "\ud83d", "F32", "BF16", [], [[]], {}, [0], [0, 0], [0, 10**12], [-1, 4], {"a": {}}, [1, 2, 3, 4, 5, 6])


def _broken(data: bytes, name: str, rng: random.Random) -> bytes:
    kind = Path(name).suffix
    aware = {".safetensors": _safetensors, ".npy": _npy, ".pth": _pth, ".png": _png}.get(kind)
    if aware is not None and rng.random() < 0.7:
        return aware(data, rng)
    return _bytes(data, rng)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits turned, parts lost, doubled, put in or overwritten."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        if not out:
            break
        # Most of what a reader looks at is at the beginning, and in some kinds at the end.
        start = rng.choice((rng.randrange(len(out)), rng.randrange(min(len(out), 200)), max(len(out) - rng.randrange(1, 300), 0)))
        length = rng.choice((1, 1, 2, 4, 8, 100))
        kind = rng.randrange(7)
        if kind == 0:
            out[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[start:]
        elif kind == 2:
            del out[start : start + length]
        elif kind == 3:
            out[start:start] = out[start : start + length]
        elif kind == 4:
            out[start : start + length] = rng.randbytes(length)
        elif kind == 5:
            out[start : start + length] = bytes([rng.choice((0, 255, 127, 128))]) * length
        else:
            out[start : start + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 1, 2, 65535, 65536, 10**8, 2**31 - 1, 2**31, 2**32 - 1)))
    return bytes(out)


def _mutated(value: Any, rng: random.Random) -> Any:
    """JSON with one thing in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        rest = {name: item for name, item in value.items() if name != key}
        if kind == 0:
            return rest
        if kind == 1:
            return rest | {rng.choice(("", "__metadata__", f"{key}.0", key.replace("0", "100000000"), "blocks." + "9" * 5000 + ".q")): value[key]}
        return value | {key: _mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        index = rng.randrange(len(value))
        return [*value[:index], _mutated(value[index], rng), *value[index + 1 :]]
    if isinstance(value, str) and value.startswith("{") and rng.random() < 0.9:  # JSON inside
        return json.dumps(_mutated(json.loads(value), rng))
    if isinstance(value, int) and rng.random() < 0.7:
        return rng.choice((value + 1, value - 1, -value, value * 2, value + 10**8, *ODD_NUMBERS))
    return rng.choice(ODD)


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = rng.randrange(10)
    if kind == 0:
        body = _bytes(body, rng)
    elif kind == 1:
        return rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    elif kind == 2:
        text = b"[" * 100000 if rng.random() < 0.5 else b'{"a":' * 50000
        return len(text).to_bytes(8, "little") + text + body
    elif kind == 3:  # of the right size in the file, and of an odd shape
        name = rng.choice([name for name in header if name != "__metadata__"])
        start, stop = header[name]["data_offsets"]
        elements = (stop - start) // 4
        header[name]["shape"] = rng.choice(([elements], [1] * 9 + [elements], [elements, 1, 1, 1], [1, elements], []))
        if rng.random() < 0.3 and len(header) > 2:  # nothing of it in the file
            last = max((item for item in header if item != "__metadata__"), key=lambda item: header[item]["data_offsets"][1])
            size = header[last]["data_offsets"][0]
            header[last] |= {"shape": rng.choice(([0, 10**12], [10**9, 0, 3, 3], [0])), "data_offsets": [size, size]}
            body = body[:size]
    elif kind == 4:
        body = np.full(len(body) // 2, np.nan, np.float16).tobytes().ljust(len(body), b"\0")
    else:
        for _ in range(rng.choice((1, 1, 2))):
            header = _mutated(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _npy(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[8:10], "little")
    text = data[10 : 10 + length].decode("latin1")
    change = rng.choice(
        (
            ("(", "((" * rng.choice((1, 100, 4000))),
            ("5", rng.choice(("-5", "10**12", "99999999999999999999", "5.0", "None", "1000000000000", "'5'", "True", "5" * 5000))),
            (
                "'<u2'",
                rng.choice(("'O'", "'|V8'", "'<u8'", "None", "[('a', '<u2')]", "'(9999999,9999999)u2'", "'<M8[ns]'", "'i4,,'", "'\\u0000'", "5")),
            ),
            ("False", rng.choice(("0", "'", "-" * 9000, "not " * 2000, "1if 1else 1"))),
            ("'shape'", rng.choice(("'shapes'", "None", "shape"))),
            ("{", rng.choice(("", "[", "{{", "{" + "[" * 3000))),
        )
    )
    text = text.replace(*change, 1)
    version, size = rng.choice(((b"\1\0", 2), (b"\1\0", 2), (b"\2\0", 4), (b"\3\0", 4), (b"\7\7", 4)))
    shown = rng.choice((len(text), len(text), len(text), 2 ** (8 * size) - 1, 0))
    return data[:6] + version + min(shown, 2 ** (8 * size) - 1).to_bytes(size, "little") + text.encode("latin1") + data[10 + length :]


def _pth(data: bytes, rng: random.Random) -> bytes:
    """The pickle changed inside of a sound archive."""
    if data[:2] != b"PK":
        return _bytes(data, rng)
    file, where = io.BytesIO(), rng.choice(("data.pkl", "data.pkl", "data.pkl", "/data/", "version", "byteorder"))
    compressed = rng.random() < 0.05
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            part = old.read(entry)
            if where in entry.filename and rng.random() < 0.8:
                part = _bytes(part, rng)
            new.writestr(entry.filename, part)
    return file.getvalue()


def _png(data: bytes, rng: random.Random) -> bytes:
    """A chunk changed, and its check sum with it."""
    out, position = data[:8], 8
    chunks = []
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        chunks.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + size]))
        position += 12 + size
    index = rng.randrange(len(chunks))
    tag, value = chunks[index]
    if tag == b"IHDR" and rng.random() < 0.7:
        sizes = struct.pack(">II", *(rng.choice((0, 1, 24, 1000, 13000, 60000, 2**31 - 1, 2**32 - 1)) for _ in range(2)))
        chunks[index] = tag, sizes + value[8:]
    else:
        chunks[index] = rng.choice(((tag, _bytes(value, rng)), (tag[::-1], value), (tag, b"")))
    for tag, value in chunks:
        out += struct.pack(">I", len(value)) + tag + value + struct.pack(">I", zlib.crc32(tag + value))
    return out


def outcome(reader: str, path: Path) -> str | None:
    """None where the file loads, else the sentence that a user gets. Raises AssertionError where that is none."""
    try:
        READERS[reader].load(path)
    except (FileError, OSError) as error:
        text = str(error)
        assert path.name in text, f"{reader}: {text!r} does not name {path.name}"
        assert not OF_PYTHON.search(text), f"{reader}: {text!r} tells of a program"
        assert "\n" not in text and len(text) < 1000, f"{reader}: {text!r} is no sentence"
        return text
    except BaseException as error:
        raise AssertionError(f"{reader}: {path.name} ends in {type(error).__name__}: {error}") from error
    return None


def main() -> int:
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    failed: list[str] = []
    for index, reader in enumerate(READERS):
        share = range(total * index // len(READERS), total * (index + 1) // len(READERS))
        seen: Counter[str] = Counter()
        slowest, start = (0.0, ""), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for name, data in broken(reader, range(len(share))):
                path = Path(folder, name)
                path.write_bytes(data)
                began = time.monotonic()
                try:
                    seen["loads" if outcome(reader, path) is None else "refused"] += 1
                except AssertionError as error:
                    seen["FAILED"] += 1
                    failed.append(str(error))
                    print(error, file=sys.stderr)
                    if error.__cause__ is not None:
                        print("   ", "".join(traceback.format_tb(error.__cause__.__traceback__)[-2:]).replace("\n", "\n    "), file=sys.stderr)
                slowest = max(slowest, (time.monotonic() - began, name))
                path.unlink()
        print(
            f"{reader:12} {len(share)} files: {dict(seen)}; {time.monotonic() - start:.0f} s, slowest {slowest[0]:.2f} s ({slowest[1]})", flush=True
        )
    import resource

    print(f"{total} files, {len(failed)} failed, at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB of memory")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
