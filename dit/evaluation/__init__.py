"""The metrics and figures of the evaluate stage."""
