"""Text helpers of rewards that read prompts. No torch."""


def writable(text: str) -> str:
    """Half surrogate pairs, which no tokenizer takes, as question marks."""
    return text.encode("utf-8", "replace").decode()
