"""AudioGen (arXiv 2209.15352): text to audio by a language model of an audio codec's tokens."""
