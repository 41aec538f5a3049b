"""The scoring service: how well a clip and a sentence go together, by CLAP."""
