"""Vision-language judges, local or behind a server: questions in, replies and scores out. Not rewards themselves."""
