"""The small layered model that comes with Tessera: its pictures, caption, networks, training and evaluation."""
