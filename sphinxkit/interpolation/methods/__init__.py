"""One file a merge method: its formula, options, paper, and the registration of its name."""
