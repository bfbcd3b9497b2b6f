"""Judges that write their verdict: imitation of critiques, of their own correct replies, and policy gradient."""
