"""What upscaling and layers share: picture files, containers of video, Y'CbCr, sound, and files that appear when they are whole."""
