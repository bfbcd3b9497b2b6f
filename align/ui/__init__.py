"""Pages on this machine alone: the server that ``alignflow label`` and ``alignflow ui`` share, and the list of runs."""
