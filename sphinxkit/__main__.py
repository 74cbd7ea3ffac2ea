"""``python -m sphinxkit``."""

from sphinxkit.cli import main

if __name__ == "__main__":
    main()
