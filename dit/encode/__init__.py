"""Writes the latent cache: images and captions through the encoders, once."""
