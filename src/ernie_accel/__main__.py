"""``python -m ernie_accel`` is the command ``ernie-accel``."""

from ernie_accel.cli import main

if __name__ == "__main__":
    main()
