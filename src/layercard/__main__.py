"""`python -m layercard`."""

from layercard.commands.main import main

if __name__ == "__main__":
    main()
