"""Rewards and preferences: published sets of them, how well a reward agrees, training rewards on them."""
