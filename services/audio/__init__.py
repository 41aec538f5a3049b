"""Decode, encode, resample, draw and check sound; check prompts."""
