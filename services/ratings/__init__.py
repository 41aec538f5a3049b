"""Ratings by people: blind pairs of clips, who rated them how, and what became of it.

Start with `store`: `RatingStore`. `planning` makes the pairs, `agreement` says how far raters agree, `export`
writes what training reads. Needs the extra `ratings`.
"""
