"""The way of one attention call through the pack's files, as `sys.setprofile` sees it. `test_architecture.py` holds it against the text.

python comfy_attention_way.py COMFYUI PACKAGE_PARENT   prints it as JSON, of a call from ComfyUI: run with ComfyUI's Python
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
FLOORS = ("nodes", "models", "kernels")


def passed(call: Callable[[], object]) -> list[tuple[str, str]]:
    """(file, function) of every function of the pack that `call` enters, in order; files relative to the pack."""
    entered: list[tuple[str, str]] = []

    def note(frame, event: str, _) -> None:
        if event == "call":
            file = Path(frame.f_code.co_filename)
            if file.is_absolute() and any((file := file.resolve()).is_relative_to(PACK / floor) for floor in FLOORS):
                entered.append((file.relative_to(PACK).as_posix(), frame.f_code.co_name))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


SIGMAS = (0.9, 0.5, 0.4)
"""Noise levels of three steps: in the first a call is looked at, in the next one loads what computes it, the last is like all that follow."""


def from_comfyui() -> list[list[tuple[str, str]]]:
    """A self-attention call in each of three steps, from where ComfyUI hands it to an attention override."""
    import torch

    from tessera.kernels import backends
    from tessera.models.families import TokenSpans
    from tessera.models.patchers.attention import ModelCall
    from tessera.models.patchers.settings import AttentionSettings
    from tessera.nodes.attention.host import KEY, _AttentionHost

    backends.register_all()
    host = _AttentionHost(AttentionSettings(min_tokens=0, start_percent=0.0), None)
    host.patch.start()
    override = host.overrides[None]
    q = torch.randn(1, 320, 32)

    def comfys_own(q, *arguments, **keywords):
        return q

    ways = []
    for sigma in SIGMAS:
        call = ModelCall(TokenSpans(5, 8, 8), sigma)
        host.patch.begin(call)
        ways.append(passed(lambda call=call: override(comfys_own, q, q, q, 2, transformer_options={KEY: call})))
    return ways


if __name__ == "__main__":
    _, comfyui, package_parent = sys.argv
    sys.argv = sys.argv[:1]
    sys.path.insert(0, comfyui)
    sys.path.append(package_parent)
    from comfy.cli_args import args

    args.cpu = True
    import utils.extra_config  # noqa: F401  (first, as main.py does: nodes.py puts a folder with another `utils` before it)

    print("WAY " + json.dumps(from_comfyui()))
