"""Run folders: checkpoints, metrics, locks, summaries."""
