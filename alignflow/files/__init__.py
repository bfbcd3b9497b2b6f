"""Files that several packages read and write: weights, LoRAs, pictures, rows of text. No torch at import."""
