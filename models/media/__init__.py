"""What upscaling and layers share: picture files, containers of video, Y'CbCr, sound, and files that appear when they are whole."""

__all__ = ["atomic", "containers", "picture_files", "png_text", "resize", "sound", "ycbcr"]
