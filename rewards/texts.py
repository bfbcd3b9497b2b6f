"""What every reader of prompts needs. No torch."""


def writable(text: str) -> str:
    """Half surrogate pairs, which no tokenizer takes, as question marks."""
    return text.encode("utf-8", "replace").decode()
