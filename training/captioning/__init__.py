"""Training of captioners: SLAM-AAC's programs."""
