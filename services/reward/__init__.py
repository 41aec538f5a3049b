"""The reward service: predict how much a listener would like a clip for its prompt."""
