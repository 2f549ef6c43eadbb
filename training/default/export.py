"""Write the two weight files with their metadata from a training work folder.

python -m tessera.training.default.export --work DIR [--folder WHERE] [--vae vae_final.pt] [--note TEXT]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tessera.models.default import networks

HERE = os.path.dirname(os.path.abspath(networks.__file__))  # where the pack has them
VAE_FILE = os.path.join("vae", "tessera_shapes_vae.safetensors")
DIT_FILE = os.path.join("diffusion_models", "tessera_shapes_t2v.safetensors")
COMMON = {
    "license": "Apache-2.0",
    "dataset": "procedurally drawn clips (training/default/clips.py), no external data",
    "architecture_source": "Wan 2.1 (github.com/Wan-Video/Wan2.1, Apache-2.0); weights trained from scratch",
}


def write(state: Mapping[str, Tensor], path: str, dtype: torch.dtype, meta: dict[str, str]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_file({k: v.detach().to("cpu", dtype).contiguous().clone() for k, v in state.items()}, path, metadata=meta)
    os.chmod(path, 0o644)
    print(path, f"{os.path.getsize(path) / 1e6:.2f} MB")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--work", required=True)
    ap.add_argument("--folder", default=HERE)
    ap.add_argument("--vae", default="vae_folded.pt")
    ap.add_argument("--note-vae", default="")
    ap.add_argument("--note", default="")
    o = ap.parse_args()

    def load(name: str) -> dict[str, Any]:
        return torch.load(os.path.join(o.work, name), weights_only=True, map_location="cpu")

    write(
        load(o.vae)["model"],
        os.path.join(o.folder, VAE_FILE),
        torch.float16,
        {
            **COMMON,
            "title": "Tessera shapes VAE",
            "training": o.note_vae or "Muon and AdamW, mean squared error, small L1 and KL terms",
            "config": json.dumps({"vae": {k: v for k, v in networks.VAE_CONFIG.items()}}),
        },
    )
    dit = load("dit.pt")
    write(
        dit["ema"],
        os.path.join(o.folder, DIT_FILE),
        torch.bfloat16,
        {
            **COMMON,
            "title": "Tessera shapes text-to-video",
            "training": o.note or f"rectified flow, {dit['step']} steps, {dit['seen']} samples, averaged weights",
            "config": json.dumps({"transformer": {"text_dim": networks.DIT_CONFIG["text_dim"], "num_heads": networks.DIT_CONFIG["heads"]}}),
        },
    )


if __name__ == "__main__":
    main()
