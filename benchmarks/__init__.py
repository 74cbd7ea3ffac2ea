"""Component benchmarks of sphinxkit: one script per component on one harness (see README.md)."""
