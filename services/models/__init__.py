"""The model classes that are both served and trained. PyTorch only: no protocol, no server."""
