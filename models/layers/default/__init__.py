"""Tessera's small layered model: its weights, pictures, caption, networks, training and evaluation."""
