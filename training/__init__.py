"""What trained the small weights of the pack. In no wheel and no registry package: it imports `tessera`, and nothing of that imports it."""
