"""The reward model: a head on CLAP's tokens."""
