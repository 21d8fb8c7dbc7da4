"""Whole programs that attack: limits (`BOMBS`) and verdicts (`FAKES`). For a jail, nowhere else."""

from __future__ import annotations

WRITTEN = 64 * 8 * 2**20  # bytes that number 60 would write
BOMBS: dict[int, tuple[str, set[str]]] = {
    # number: a program, and the ends that mean it was held
    57: ("x = []\nwhile True: x.append(bytearray(10**6))", {"memory", "timeout"}),
    58: (
        "import mmap\nx = []\n"
        "while True:\n x.append(mmap.mmap(-1, 2**26))\n x[-1].write(bytes(2**26))",
        {"memory", "error", "timeout"},
    ),
    59: ("import os\nos.memfd_create('x')", {"denied"}),
    60: (
        "for i in range(64):\n open(str(i), 'wb').write(bytes(8 * 2**20))",
        {"disk", "error"},
    ),
    61: ("for i in range(60000): open(str(i), 'w').close()", {"disk", "timeout"}),
    62: ("import os\nos.ftruncate(os.open('x', os.O_RDWR | os.O_CREAT), 2**40)", {"disk"}),
    63: ("while True: print('x' * 1000)", {"output"}),
    64: ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}),
    65: ("while True: pass", {"timeout"}),
    66: ("(10**5000) ** 50000", {"timeout", "memory"}),
    67: ("import re\nre.match('(a+)+$', 'a' * 40 + 'b')", {"timeout"}),
    68: ("eval('-' * 10**6 + '1')", {"error", "memory", "killed"}),
    70: ("import os, faulthandler\nos.abort()", {"killed"}),
    44: ("import threading\nthreading.Event().wait()", {"timeout"}),
    80: (
        "import io, zipfile\nb = io.BytesIO()\nz = zipfile.ZipFile(b, 'w', zipfile.ZIP_DEFLATED)\n"
        "z.writestr('x', bytes(10**8))\nz.close()\nwhile True: zipfile.ZipFile(b).extract('x')",
        {"error", "disk", "memory", "timeout"},
    ),
    82: (  # files that no folder shows any more
        "import os, time\nfor i in range(50):\n f = os.open('x', os.O_RDWR | os.O_CREAT)\n"
        " os.unlink('x')\n os.write(f, bytes(2**21))\ntime.sleep(60)",
        {"disk"},
    ),
    83: (  # signals are no way to live on
        "import signal\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n"
        " except (OSError, ValueError): pass\nwhile True: pass",
        {"timeout"},
    ),
    84: ("import os\nwhile True: os.mkdir('d'); os.chdir('d')", {"error", "disk"}),
    85: (
        "import os, time\nfor _ in range(90): os.mkdir('d' * 200); os.chdir('d' * 200)\n"
        "time.sleep(60)",
        {"disk", "timeout"},  # "timeout": where the host has no need to count them
    ),
}


CHECK = "def check(candidate):\n assert candidate(2) == 4\n assert candidate(5) == 25\n"
FAKES: dict[int, str] = {
    # number: a candidate for `f` of CHECK that is no square, and wants to pass
    71: "import os\ndef f(x): os._exit(0)",
    171: "import os\nos._exit(0)\ndef f(x): return 0",
    72: "import sys\nsys.exit(0)",
    172: "import sys\ndef f(x): sys.exit(0)",
    73: """
import os, json, struct
data = json.dumps({"nonce": "", "passed": True, "value": 4, "ready": 0}).encode()
for d in (1, 2, 3, 4):
    try: os.write(d, struct.pack(">I", len(data)) + data)
    except OSError: pass
print("passed"); print(json.dumps({"passed": True}))
def f(x): return 0
""",
    173: """
import os, json, struct
def f(x):
    data = json.dumps({"value": 4}).encode()
    for d in range(3, 64):
        try: os.write(d, (struct.pack(">I", len(data)) + data) * 2)
        except OSError: pass
    os._exit(0)
""",
    74: """
import os, pickle, struct
class P:
    def __reduce__(self): return (os._exit, (0,))
def f(x):
    data = pickle.dumps(P())
    os.write(4, struct.pack(">I", len(data)) + data)
    os.write(3, struct.pack(">I", len(data)) + data)
    return P()
""",
    75: r"""
import sys, os
os.write(1, b'\xff\x00\xfe\x00' * 100); os.write(2, bytes(range(256)))
def f(x): return '\udcff\x00'
""",
    76: """
class Same(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def f(x): return Same(0)
""",
    176: """
class Same:
    def __eq__(self, other): return True
    def __getattr__(self, name): return self
    def __iter__(self): return iter(())
def f(x): return Same()
""",
    77: """
import builtins, sys
builtins.AssertionError = type("AssertionError", (SystemExit,), {})
builtins.compile = builtins.exec = lambda *a, **k: None
builtins.__build_class__ = None
sys.modules.clear()
def f(x): return 0
""",
    78: """
import gc, sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in frame.f_locals.values():
            if isinstance(value, str) and "assert candidate" in value:
                return eval(value.split("== ")[1].split()[0])
        frame = frame.f_back
    texts = [v for d in gc.get_objects() if type(d) is dict for v in list(d.values())]
    if any(isinstance(v, str) and "def check(" in v and "x" * 3 not in v for v in texts):
        return x * x
    return 0
""",
    81: """
import atexit, threading, json, time
class Late:
    def __del__(self): print(json.dumps({"passed": True}))
late = Late()
atexit.register(lambda: print("passed"))
threading.Thread(target=lambda: (time.sleep(0.2), print("passed")), daemon=True).start()
def f(x): return 0
""",
    181: "import time\ndef f(x): time.sleep(60)",
    182: "def f(x): return 10**10**8",
    183: "def f(x): raise AssertionError",
    184: "def f(x):\n while True: pass",
    185: "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)",
}
