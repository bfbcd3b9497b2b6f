"""How the embedded worlds are judged: media parsed back into scenes, compared with captions."""
