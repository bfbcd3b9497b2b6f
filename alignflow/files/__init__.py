"""Files that several packages read and write: weights, LoRAs, images, rows of text. No torch at import."""
