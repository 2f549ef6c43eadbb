"""Flux and Chroma: joint attention, text first, one image, reference latents appended."""

from .layout import Family, TokenLayout, patches, tokens


def layout(network, latent_shape, extras):
    patch_size = (network.patch_size, network.patch_size)
    references = sum(tokens(tuple(latent.shape), patch_size) for latent in extras.get("ref_latents") or ())
    return TokenLayout(*patches(latent_shape, patch_size), text="first", references_after=references)


FLUX = Family("Flux", ("comfy.ldm.flux.", "comfy.ldm.chroma."), layout)
