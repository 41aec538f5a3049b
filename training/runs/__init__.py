"""Recipes, and the whole loop."""
