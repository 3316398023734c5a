"""The latent cache in data/latents: its format and its reader."""
