"""What a server runs on a chunk, and frames on the wire, by nodes of ComfyUI itself: newer servers read and write 16 bits, older ones 8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from torch import Tensor

from ..models.media.picture_files import read_picture
from .comfy_client import ComfyClient
from .workflow_files import read_workflow

NODE = "TesseraPatchUpscaleVideo"
SAVE = "tessera_save"
PIECE = 48 * 2**20  # bytes of a file that is sent, more or less: a server takes 100 MB unless it was told otherwise


class Workflow:
    """An API-format workflow of which the upscaling node and what it needs is run, with other frames each time."""

    def __init__(self, graph: dict[str, Any], node: str) -> None:
        self.graph, self.node = graph, node

    @staticmethod
    def read(file: Path) -> Workflow:
        """Raises FileError or ValueError that names the file and what it lacks."""
        graph = read_workflow(file)
        nodes = [name for name, node in graph.items() if node["class_type"] == NODE]
        if len(nodes) != 1:
            raise ValueError(f"{file} has {len(nodes)} nodes of type {NODE} (Patch Upscale Video); it needs one, which gets the frames")
        inputs = graph[nodes[0]]["inputs"]
        for name in [name for name in inputs if name == "image" or name.partition(".")[0] == "size"]:
            del inputs[name]
        needed, links = set[str](), [nodes[0]]
        while links:
            name = links.pop()
            if name not in needed:
                needed.add(name)
                values = [value[0] for value in graph[name]["inputs"].values() if isinstance(value, list) and len(value) == 2]
                links += [value for value in values if isinstance(value, str) and value in graph]
        return Workflow({name: node for name, node in graph.items() if name in needed}, nodes[0])

    def with_frames(self, files: Sequence[str], prefix: str, deep: bool) -> dict[str, Any]:
        """To queue: the frames of these video files, one after the other, enlarged and saved as PNG files of `deep` 16 or of 8 bits."""
        frames, nodes = transfer_in(files)
        upscaled = self.graph[self.node]
        upscaled = {**upscaled, "inputs": {**upscaled["inputs"], "image": frames}}
        return {**self.graph, **nodes, self.node: upscaled, SAVE: transfer_out([self.node, 0], prefix, deep)}


def transfer_in(files: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """The link to the frames of video files, and the nodes that load them. files: as in a Load Video node."""
    nodes: dict[str, Any] = {}
    frames: list[Any] = []
    for index, file in enumerate(files):
        nodes[f"tessera_video_{index}"] = {"class_type": "LoadVideo", "inputs": {"file": file}}
        nodes[f"tessera_frames_{index}"] = {"class_type": "GetVideoComponents", "inputs": {"video": [f"tessera_video_{index}", 0]}}
        part = [f"tessera_frames_{index}", 0]
        if frames:
            nodes[f"tessera_joined_{index}"] = {"class_type": "ImageBatch", "inputs": {"image1": frames, "image2": part}}
            part = [f"tessera_joined_{index}", 0]
        frames = part
    return frames, nodes


def transfer_out(images: list[Any], prefix: str, deep: bool) -> dict[str, Any]:
    """The node that saves images."""
    if not deep:
        return {"class_type": "PreviewImage", "inputs": {"images": images}}
    how = {"format": "png", "format.bit_depth": "16-bit", "format.input_color_space": "sRGB"}
    return {"class_type": "SaveImageAdvanced", "inputs": {"images": images, "filename_prefix": prefix, **how}}


def takes_16_bits(server: ComfyClient) -> bool:
    """Whether its core nodes hand over more than 8 bits, in and out."""
    components = server.get("/object_info/GetVideoComponents")["GetVideoComponents"]
    return "bit_depth" in components["output_name"] and "SaveImageAdvanced" in server.get("/object_info/SaveImageAdvanced")


def write_frames(frames: Tensor, folder: Path, deep: bool) -> list[Path]:
    """Lossless video files of `(frames, 3, height, width)` in 0..1, each of about PIECE bytes, in a form that servers read without a shift."""
    suffix, codec, kind, top = (".mkv", "ffv1", "gbrp16le", 65535) if deep else (".mov", "png", "rgb24", 255)
    files: list[Path] = []
    rest = iter(frames)
    frame = next(rest, None)
    while frame is not None:
        files.append(folder / f"{len(files):03}{suffix}")
        with av.open(f"file:{files[-1]}", "w") as container:
            video: Any = container.add_stream(codec, rate=25)
            video.height, video.width = frame.shape[1:]
            video.pix_fmt = kind
            size = 0
            while frame is not None and size < PIECE:
                codes = np.ascontiguousarray((frame.movedim(0, -1) * top).round().numpy(), np.uint16 if deep else np.uint8)
                packets = video.encode(av.VideoFrame.from_ndarray(codes, format=kind))
                size += sum(packet.size for packet in packets)
                container.mux(packets)
                frame = next(rest, None)
            container.mux(video.encode(None))
    return files


def read_frame(file: Path, deep: bool) -> Tensor:
    """(3, height, width) in 0..1 of a picture that a server saved."""
    pixels = read_picture(file).pixels[:3]
    if not deep:
        # ComfyUI cuts off what is between two codes, so the middle is the best guess; black and white are mostly what was clamped.
        pixels += ((pixels > 0) & (pixels < 1)) * (0.5 / 255)
    return pixels
