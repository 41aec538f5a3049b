"""CLAP: the model, its folders, LAION's checkpoints, and LAION's own package as a backend."""
