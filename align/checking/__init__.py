"""What ``alignflow check`` finds before anything runs. No torch."""
