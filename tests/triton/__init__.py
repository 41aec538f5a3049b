"""Our models in a real Triton: `make test-triton`."""
