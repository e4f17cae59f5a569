"""``python -m spanwise`` is the program ``spanwise``."""

from spanwise.cli.main import main

if __name__ == "__main__":
    main()
