"""The resumable training loop, its run folder, its configuration and its progress lines."""
