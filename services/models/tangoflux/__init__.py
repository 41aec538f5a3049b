"""TangoFlux (arXiv 2412.21037): a flow-matching transformer over the latents of waveforms."""
