"""``python -m sphinxkit.cli``."""

from sphinxkit.cli import main

if __name__ == "__main__":
    main()
