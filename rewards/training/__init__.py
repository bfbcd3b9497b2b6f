"""What rewards are trained with: losses on scores, heads on features, and the settings of both. No loops, no files."""
