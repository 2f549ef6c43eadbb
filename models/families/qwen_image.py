"""Qwen-Image, Edit and Layered: joint attention, text first, reference latents appended. Layers count as frames."""

from .layout import Family, TokenLayout, patches, tokens


def layout(network, latent_shape, extras):
    patch_size = (network.patch_size, network.patch_size)
    references = sum(tokens(tuple(latent.shape), patch_size) for latent in extras.get("ref_latents") or ())
    return TokenLayout(*patches(latent_shape, patch_size), text="first", references_after=references)


QWEN_IMAGE = Family("Qwen-Image", ("comfy.ldm.qwen_image.",), layout)
