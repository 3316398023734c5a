"""The commands of `dit`, one in a file."""
