"""Tessera's small layered model: its weights, pictures, caption, networks, training and evaluation."""

__all__ = ["networks", "sampling", "vocabulary"]
