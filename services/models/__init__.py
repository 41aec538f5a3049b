"""Every model class that is both served and trained. PyTorch only: no protocol, no server."""
