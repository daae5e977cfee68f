"""Serve the stand-in for the hub to commands in another terminal.

python -m tests.hub            prints `export HF_ENDPOINT=...` and serves until Ctrl-C
python -m tests.hub 8123       at that port
"""

import contextlib
import sys

from tests.hub.contents import stand_in

hub = stand_in(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
for name, value in hub.variables.items():
    print(f"export {name}={value}", flush=True)
with contextlib.suppress(KeyboardInterrupt):
    hub.serve_forever()
