"""The data set in data/raw, as every source writes it: its format, its storage, its reading, and the decoding of its images."""
