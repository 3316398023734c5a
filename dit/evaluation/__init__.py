"""The metrics of the evaluate stage."""
