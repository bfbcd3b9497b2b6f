"""One short file per algorithm; :mod:`align.config.registry` finds them by listing this folder."""
