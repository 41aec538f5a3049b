"""Sound and prompts as they come in and go out: decoding, encoding, resampling, spectrograms, checks."""
