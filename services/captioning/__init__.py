"""The captioning service: describe clips in sentences."""
