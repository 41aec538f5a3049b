"""Metrics, what they are computed on, and reports. Imports the independent judge."""
