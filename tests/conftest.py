"""What every test may take for granted of the process that it runs in."""

from __future__ import annotations

import signal

# A shell that starts the tests in the background may have them ignore Ctrl-C; what they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
