"""`python -m fakd` is the `fakd` command."""

import sys


def main() -> None:
    """Run the command with the arguments of this process."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error}; pip install "fakd[train]" installs what the fakd command needs.')
    app(prog_name="fakd")


if __name__ == "__main__":
    main()
