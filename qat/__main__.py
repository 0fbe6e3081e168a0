"""``python -m qat`` is the command ``qat``."""

from qat.cli import main

if __name__ == "__main__":
    main()
