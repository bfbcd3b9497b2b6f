"""How the generic adapter watches a pipeline: recorded calls and their arguments."""
