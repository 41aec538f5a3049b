"""From a model URI to a verified folder of weights."""
