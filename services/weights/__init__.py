"""Resolve model URIs to verified folders of weights."""
