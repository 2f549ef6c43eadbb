"""Sparse methods as recipes of exchangeable parts. `recipes.py` lists the papers."""

from .grid import TokenGrid
from .plan import Arrangement, describe, prepare, sparse_attention
from .recipes import RECIPES, Recipe, Setting, get

__all__ = ["RECIPES", "Arrangement", "Recipe", "Setting", "TokenGrid", "describe", "get", "prepare", "sparse_attention"]
