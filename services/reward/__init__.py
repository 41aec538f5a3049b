"""The reward service: how much a listener would like a clip for a sentence."""
