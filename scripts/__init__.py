"""The commands. The only thing here is what must hold before one of them is read: Ctrl-C during its
imports is one line and code 130.
"""

import sys
from types import TracebackType


def _end_quietly(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, traceback)
    print("interrupted", file=sys.stderr, flush=True)
    raise SystemExit(130)


# so the interpreter has it while it looks for the module to run; whoever imports a script is left
# alone
if sys.argv[:1] == ["-m"]:
    sys.excepthook = _end_quietly
