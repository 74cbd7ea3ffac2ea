"""Training data: samples, conversations, mixtures, and the converters that write them."""
