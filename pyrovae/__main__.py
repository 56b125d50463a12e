"""The command line, as `python -m pyrovae`."""

from pyrovae.cli import app

if __name__ == "__main__":
    app()
