"""The scoring service: score how well clips match their prompts, by CLAP."""
