"""Judges that write their verdict: imitation of critiques, of their own right replies, and policy gradient."""
