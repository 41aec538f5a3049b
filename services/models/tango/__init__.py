"""Tango and Tango 2: the pipeline, its schedulers, loading, and conversion of released checkpoints."""
