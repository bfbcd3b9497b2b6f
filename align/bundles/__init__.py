"""A training run in one file, with everything that another machine needs to repeat it."""
