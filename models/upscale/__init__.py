"""Super-resolution: the networks, the tiling core that runs anything patch by patch, and small trained weights."""
