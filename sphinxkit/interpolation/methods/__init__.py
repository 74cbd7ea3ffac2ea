"""Merge methods, one per file: formula, options, paper, and registration."""
