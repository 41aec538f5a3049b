"""The explanation service: which word of a prompt made which sound of a clip."""
