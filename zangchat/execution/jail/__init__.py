"""The program inside the sandbox, started as `python -I -S -B` on the bytecode of these modules.

Order matters: namespaces need privileges, dropping the user needs them too, and the seccomp filter
comes last because it forbids the other steps. The modules import the standard library and each
other, nothing else: they run where nothing of this project is visible.
"""

import functools
import marshal
from pathlib import Path

PARTS = ("system", "wire", "seccomp", "confine", "namespaces", "main")  # each after its imports

# Given to `python -c`; reads `program()` from stdin.
START = """\
import marshal, sys
for name, code in marshal.load(sys.stdin.buffer):
    module = sys.modules[name] = type(sys)(name)
    exec(code, module.__dict__)
module.main()
"""


@functools.cache
def program() -> bytes:
    """The modules for the very interpreter that runs this; compiling takes some milliseconds."""
    folder, parts = Path(__file__).parent, []
    for part in PARTS:
        path = folder / f"{part}.py"
        code = compile(path.read_text(encoding="utf-8"), f"jail/{part}.py", "exec")
        parts.append((f"{__name__}.{part}", code))
    return marshal.dumps(parts)
