"""Text is UTF-8 whatever the locale says: files, file names, standard streams, and those of the programs started here.

A label in Japanese cannot be written in a Latin-1 locale, and what can is read as something else on the next machine.
"""

import locale
import os
import sys


def ensure() -> None:
    """Start this process anew in its place in Python's UTF-8 mode (PEP 540), unless its locale is UTF-8 already.

    What it was started with (`sys.orig_argv`) stays; `-X utf8=0` on the command line is left alone.
    """
    if (
        not sys.flags.utf8_mode
        and "utf8" not in sys._xoptions
        and locale.getencoding().lower() not in ("utf-8", "utf8")
    ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
