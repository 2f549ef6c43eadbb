"""Layer documents: composed in memory, kept in PSD, OpenRaster and PNG files, arranged by rules."""

__all__ = ["blend", "clean", "compose", "document", "formats", "layout", "regions", "transparent_vae", "video", "video_reader", "video_writer"]
