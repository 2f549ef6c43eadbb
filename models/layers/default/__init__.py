"""A small layered model for Tessera: its pictures, caption, networks, training and evaluation."""
