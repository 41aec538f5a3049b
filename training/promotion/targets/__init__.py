"""Promotion targets: Kubernetes, Triton, and a service on this machine."""
