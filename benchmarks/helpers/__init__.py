"""Parts of the commands in ``benchmarks`` that are not commands themselves."""
