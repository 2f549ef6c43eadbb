"""Tessera's small text-to-video model: networks, vocabulary, sampling, and its weights."""

__all__ = ["networks", "sampling", "vocabulary"]
