"""Train a text-to-image Diffusion Transformer on one GPU, with latents and text embeddings computed once."""

__version__ = "0.1.0"
