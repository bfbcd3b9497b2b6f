"""Vision-language models that are asked: here or behind a server, questions in, replies and scores out. No reward."""
