"""Rewards and preferences: published preference sets, agreement of a reward with them, training of rewards."""
