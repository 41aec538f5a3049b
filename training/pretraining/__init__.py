"""Train a whole generator on recordings (`milonga train new`): autoencoder ▸ latents ▸ denoiser."""
