"""`lasgd` and `python -m lasgd`, also as `torchrun -m lasgd train ...`."""

import signal


def main() -> int:
    """Runs the command; a Ctrl-C ends it from the first import on."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # see lasgd.training.interrupt.ending_at_once
    from lasgd.cli.app import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
