"""SLAM-AAC: an EAT audio encoder, a linear projector and a language model that writes a clip's caption."""
