"""Write the weight files from a training work folder.

python -m tessera.training.layers.export --work DIR [--folder WHERE] [--note TEXT]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.models.default import networks
from tessera.models.layers.default import networks as layered
from tessera.models.layers.regions import LAYER_PE, TRAINED
from tessera.models.layers.transparent_vae import published

from ..default import export
from . import train_decoder

HERE = Path(layered.__file__).parent  # where the pack has them
VAE = Path("vae", "tessera_layers_vae.safetensors")
TRANSFORMER = Path("diffusion_models", "tessera_layers.safetensors")
EMBEDDING = Path("layer_embeddings", "tessera_layers.safetensors")
DECODER = Path("transparent_decoders", "tessera_layers.safetensors")
TRAINED_ON = {
    "side": (96, 160),
    "clip_side": (96, 128),
    "box": (16, 96),
    "foregrounds": 50,
    "clip_foregrounds": 6,
    "latent_frames": (1, 3),
    "coverage": 2.3,
}
"""What `drawn.layout` makes: pixels, and how many times the canvas the boxes are together; held by a test."""
COMMON = {
    "license": "Apache-2.0",
    "dataset": "procedurally drawn layers (training/layers/drawn.py), no external data",
    "method_source": "ART (arXiv 2502.18364) on the architecture of Wan 2.1 (Apache-2.0); weights trained by the scripts in training/layers",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--folder", default=str(HERE))
    parser.add_argument("--note", default="")
    options = parser.parse_args()

    def load(name: str) -> dict[str, Any]:
        return torch.load(os.path.join(options.work, name), weights_only=True)

    def write(what: dict[str, Tensor], file: Path, dtype: torch.dtype, title: str, **more: str) -> None:
        export.write(what, os.path.join(options.folder, file), dtype, {**COMMON, "title": title, **more})

    trained = load("layers.pt")
    ema = trained["ema"]
    embedding = {LAYER_PE: ema.pop(LAYER_PE)}
    decoder = train_decoder.build()
    decoder.load_state_dict(load("decoder.pt")["model"])
    config = json.dumps({"transformer": {"text_dim": layered.CONFIG["text_dim"], "num_heads": layered.CONFIG["heads"]}})
    training = options.note or f"rectified flow, {trained['step']} steps, {trained['seen']} layouts, averaged weights"
    write(load("vae_folded.pt")["model"], VAE, torch.float16, "Tessera layers VAE", config=json.dumps({"vae": networks.VAE_CONFIG}))
    write(ema, TRANSFORMER, torch.bfloat16, "Tessera layers", config=config, training=training)
    write(embedding, EMBEDDING, torch.bfloat16, "Tessera layers, layer embedding", **{TRAINED: json.dumps(TRAINED_ON)})
    write(published(decoder), DECODER, torch.float16, "Tessera layers, transparent decoder")


if __name__ == "__main__":
    main()
