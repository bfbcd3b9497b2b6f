"""Comparison of training runs, searches and benchmarks: ``compare(folders)``, as a page and as tables. No torch."""

from __future__ import annotations

from align.comparison.page import Comparison, compare, write_page

__all__ = ["Comparison", "compare", "write_page"]
