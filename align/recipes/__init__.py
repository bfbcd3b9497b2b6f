"""One short file per algorithm; :mod:`align.registry` finds them by listing this folder."""
