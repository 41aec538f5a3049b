"""Our models in a real Triton: the repository it reads, and what its Python backend calls."""
