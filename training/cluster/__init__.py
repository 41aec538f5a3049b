"""A training Job on Kubernetes: created, and followed to its end."""
