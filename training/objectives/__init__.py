"""Losses as pure functions of tensors, and the noising of training examples."""
