"""The command line. It speaks HTTP to ComfyUI and never imports it."""
