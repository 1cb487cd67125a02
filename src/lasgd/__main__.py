"""`python -m lasgd`, also as `torchrun -m lasgd train ...`."""

from lasgd.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
