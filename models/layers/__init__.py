"""Layer documents: composed in memory, kept in PSD, OpenRaster and PNG files, arranged by rules."""
