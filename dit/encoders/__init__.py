"""VAE and CLIP: bundled, from the Hub, or from a folder."""
