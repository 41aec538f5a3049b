"""What a promotion can change: Kubernetes, Triton, or a service on this machine."""
