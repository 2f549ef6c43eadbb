"""ComfyUI itself: what every capability needs of it, and the only place where its versions differ."""
