"""Fine-tuning of the generator: supervised, diffusion-DPO and BATON."""
