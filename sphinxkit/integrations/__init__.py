"""Doors to other libraries. Each needs an optional package; the message of a missing one names the pip command."""
