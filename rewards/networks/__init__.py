"""Networks that rewards look through, with gradients to the pixels, and how their weights are read. No reward."""
