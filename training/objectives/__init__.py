"""Losses, calibration and statistics as pure functions, and the noising of training examples."""
