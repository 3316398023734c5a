"""The page metrics/report.md and its tables."""
