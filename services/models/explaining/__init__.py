"""Which word of a prompt made which sound: attribution for latent diffusion, by three methods."""
