"""``python -m align``, for launchers: ``accelerate launch -m align train config.yaml``."""

from align.cli.app import main

main()
