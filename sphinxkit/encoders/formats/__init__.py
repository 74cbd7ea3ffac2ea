"""The published formats of each encoder's weights, as data."""
