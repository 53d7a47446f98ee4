"""`python -m nybble`, for launchers such as torchrun."""

from nybble.cli.main import main

if __name__ == "__main__":
    main()
