"""`python -m tersor`: the command line."""

from tersor.cli import main

if __name__ == "__main__":
    main()
