"""LoRA-Composer (Yang et al. 2024, arXiv:2403.11627): several concept LoRAs in one picture, each in its own box. Knows no host.

Four parts. *Injection*: inside a box the cross-attention is the one of the concept's LoRA and prompt. *Isolation*: self-attention does not
pass from one concept's box to another's. *Re-initialisation*: each box starts from that part of the noise where its concept shows best.
*Enhancement*: a gradient step on the latent makes the concept appear in its box and fill it.

Where a model has no cross-attention (joint attention: Flux, Qwen-Image) the concepts' prompts are appended to the text, a mask lets each
box read its own prompt, and the LoRA is added for the tokens of its box and prompt. Constants are those of the authors' code.
"""

__all__ = ["composer", "concepts", "latent", "maps"]
