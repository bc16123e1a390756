"""``python -m adaptc``."""

from adaptc.cli import main

if __name__ == "__main__":
    main()
