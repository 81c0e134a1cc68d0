"""`python -m ppomax` is the `ppomax` command."""

from ppomax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
