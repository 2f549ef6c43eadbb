"""CATANet for spandrel, the library behind ComfyUI's *Load Upscale Model*: after `register()` the stock loader takes CATANet files."""

from __future__ import annotations

from typing import Any

from . import catanet

ARCH_ID = "tessera-CATANet"
OWN_ID = "CATANet"  # what spandrel will call its own, if it ever has one: its ids are the papers' names


def register() -> str:
    """Add CATANet to spandrel's main registry, once; what happened, in words for a log.

    Nothing is done when spandrel is not installed or knows CATANet itself.
    """
    try:
        from spandrel import MAIN_REGISTRY, Architecture, ArchSupport, ImageModelDescriptor
        from spandrel.util import KeyCondition
    except Exception as error:  # a torchvision that does not match torch raises RuntimeError
        return f"CATANet is not in the upscale model loader: spandrel cannot be imported ({error})"
    if OWN_ID in MAIN_REGISTRY:
        return "CATANet files are loaded by spandrel's own architecture"
    if ARCH_ID in MAIN_REGISTRY:
        return "CATANet is in the upscale model loader already"

    class CATANetArch(Architecture[catanet.CATANet]):
        """CATANet in spandrel's terms."""

        def __init__(self) -> None:
            detect = KeyCondition.has_all(
                "first_conv.weight",
                "blocks.0.0.means",
                "blocks.0.0.irca_attn.to_k.weight",
                "blocks.0.0.iasa_attn.to_q.weight",
                "blocks.7.1.layer.1.fn.dwconv.depthwise_conv.0.weight",
                "mid_convs.7.weight",
                KeyCondition.has_any("upconv.weight", "upconv1.weight"),
                "last_conv.weight",
            )
            super().__init__(id=ARCH_ID, name="CATANet", detect=detect)

        def load(self, state_dict: Any) -> Any:
            network = catanet.build(state_dict)
            return ImageModelDescriptor(
                network,
                state_dict,
                architecture=self,
                purpose="SR",
                tags=[],
                supports_half=True,
                supports_bfloat16=True,
                scale=network.upscale,
                input_channels=network.in_chans,
                output_channels=network.in_chans,
            )

    MAIN_REGISTRY.add(ArchSupport.from_architecture(CATANetArch()))
    return "CATANet is in the upscale model loader"
