"""Training of reward models, and their reports."""
