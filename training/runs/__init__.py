"""Recipes, and the programs that run all stages: the loop and the study."""
