"""Networks used by rewards, with gradients to the pixels, and loading of their weights. Not rewards themselves."""
