"""Pictures at another size."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic, with antialiasing where it gets smaller. `(channels, height, width)` -> `(channels, size[1], size[0])`."""
    if (picture.shape[-1], picture.shape[-2]) == tuple(size):
        return picture
    return F.interpolate(picture[None], size=(size[1], size[0]), mode="bicubic", antialias=True)[0]
