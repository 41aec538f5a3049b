"""A training Job on Kubernetes: creation, and progress until it ends."""
