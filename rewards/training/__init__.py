"""Components for training rewards: losses on scores, heads on features, settings of both. No loops, no files."""
