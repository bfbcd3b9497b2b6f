"""Remote and cached scoring: wire format and server, pool workers, a file of scores. Not rewards themselves."""
