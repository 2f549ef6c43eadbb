"""LoRA Composer: several concepts' LoRAs in one picture, each in its box."""

from .nodes import ConceptRegion, LoRAComposer

__all__ = ["ConceptRegion", "LoRAComposer"]
