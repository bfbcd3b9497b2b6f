"""``python -m align.cli``, for launchers."""

from align.cli.app import main

main()
