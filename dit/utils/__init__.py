"""Files, images, hardware and random numbers: what every room may need."""
