"""Sparse methods as recipes of exchangeable parts. `recipes.py` lists the papers."""

from .exact import affordable, sampled_error
from .grid import TokenGrid
from .plan import Arrangement, choose, describe, prepare, sparse_attention
from .recipes import RECIPES, Recipe, Setting, get, with_tail

__all__ = [
    "RECIPES",
    "Arrangement",
    "Recipe",
    "Setting",
    "TokenGrid",
    "affordable",
    "choose",
    "describe",
    "get",
    "prepare",
    "sampled_error",
    "sparse_attention",
    "with_tail",
]
