"""Pipeline recording for the generic adapter: calls and their arguments."""
