"""Evaluation of models: clips, metrics with intervals, reports. Imports the independent judge."""
