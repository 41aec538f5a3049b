"""Examples, preference pairs and labels; the cache of latents; files that are written once and resumed."""
