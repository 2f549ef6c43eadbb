"""The engine: tensors and GPUs. Rooms are listed, not imported: each loads when it is asked for."""

__all__ = ["attention", "backends", "block_mask", "dispatch", "gpu", "reference", "registry", "selftest"]
