"""Training algorithms, one short file each; :mod:`align.config.registry` finds them by listing this folder."""
