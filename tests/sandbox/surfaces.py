"""Attacks made from a small grammar, a class for each surface. For a jail, nowhere else.

A surface has fragments: pieces of a program with holes, which a seeded generator fills and puts in
a row, some in threads, each in a `try` so that a refusal does not end the rest. What they write is
small and what they name is theirs; what matters is what they do to the host's bounds, which
`grown.py` looks at from outside.
"""

from __future__ import annotations

import random
from typing import ClassVar

START = """
import ctypes, errno, fcntl, json, mmap, os, random, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
sys.modules["jail.policy"].RULES.clear()
X86 = os.uname().machine == "x86_64"
kept = []
def call(x86, arm, *a): return libc.syscall(ctypes.c_long(x86 if X86 else arm), *a)
def attempt(f, *a):
    try: return f(*a)
    except (OSError, ValueError, RuntimeError, OverflowError, TypeError): pass
def write(f, n):
    try:
        for _ in range(n): os.write(f, bytes(2**18))
    except OSError: pass
"""


class Surface:
    """Fragments by which a surface is attacked; `{n}`, `{small}` and so on are filled at random."""

    fragments: ClassVar[tuple[str, ...]]
    holes: ClassVar[dict[str, tuple[object, ...]]] = {
        "n": (0, 1, 2, 3, 4, 5, 7, 60, 63, 64, 999),
        "fd": (0, 1, 2, 3, 4, 5, 60, -1, -100),
        "many": (5, 20, 60),
        "bits": (0, 1, 2, 3, 4, 0o100, 0o300, 0o700, 0o777, 0o7777, 2**31 - 1),
        "path": ("'a'", "'b'", "'d/a'", "'.'", "'..'", "'l'", "os.getcwd()", "'/tmp'", "'/etc/passwd'",
                 "os.__file__", "'x' * 255", "'x' * 300", "'\\udcff'", "'\\n'", "''", "'/dev/full'"),
        "signal": tuple(range(1, 35)),
        "sleep": (0, 0.001, 0.02),
    }  # fmt: skip

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"{type(self).__name__} {seed}")

    def program(self) -> str:
        pieces = self._random.choices(self.fragments, k=self._random.randint(2, 7))
        lines = [START]
        for i, piece in enumerate(pieces):
            body = self._filled(piece).replace("\n", "\n  ")
            lines.append(f"def part{i}():\n try:\n  {body}\n except Exception: pass")
            if self._random.random() < 0.3:
                lines.append(f"attempt(threading.Thread(target=part{i}, daemon=True).start)")
            else:
                lines.append(f"part{i}()")
        return "\n".join(lines) + "\n"

    def _filled(self, piece: str) -> str:
        for hole, values in self.holes.items():
            while f"{{{hole}}}" in piece:
                piece = piece.replace(f"{{{hole}}}", str(self._random.choice(values)), 1)
        return piece.replace("{{", "{").replace("}}", "}")


class Descriptors(Surface):
    fragments = (
        "for _ in range({many}): kept.append(os.open('x', os.O_RDWR | os.O_CREAT)); os.unlink('x'); write(kept[-1], 4)",
        "libc.close_range({fd}, {fd}, {n})",
        "os.dup2({fd}, {fd})",
        "os.close({fd})",
        "kept.append(os.dup({fd}))",
        "r = os.open('/proc/self/fd/{fd}', os.O_RDONLY | os.O_NONBLOCK); os.write(1, b'x'); os.read(r, 9)",
        "attempt(os.set_blocking, {fd}, False)",
        "fcntl.fcntl({fd}, {n}, {bits})",
        "os.ftruncate({fd}, 2**{n})",
        "for _ in range({many}): kept.extend(os.pipe())",
        "call(56, 220, ctypes.c_ulong(0x10900), 0, 0, 0, 0)",
        "os.pwrite(os.open('s', os.O_RDWR | os.O_CREAT), b'x', 2**{n} % 2**24)",
        "os.copy_file_range({fd}, {fd}, 2**20)",
        "os.sendfile({fd}, {fd}, 0, 2**20)",
    )  # fmt: skip


class Sockets(Surface):
    fragments = (
        "libc.send(3, b'!', 1, {bits})",
        "libc.recv(3, ctypes.create_string_buffer(9), 9, {bits})",
        "a, b = socket.socketpair(); kept.extend((a, b)); a.setblocking(False); attempt(a.send, bytes(2**20))",
        "a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [os.open('x', os.O_RDWR | os.O_CREAT)])",
        "os.write(3, struct.pack('>I', {n}) + b'{{}}' * {n})",
        "data = json.dumps({{'ready': {n}, 'nonce': '', 'code': {n}, 'status': 'denied', 'value': 'forged'}}).encode(); os.write(3, struct.pack('>I', len(data)) + data)",
        "data = b'[' * {n} * 999; os.write(3, struct.pack('>I', len(data)) + data)",
        "socket.socket(socket.{family}, socket.SOCK_STREAM).connect(('127.0.0.1', 9))",
        "libc.shutdown({fd}, {n} % 3)",
        "s = socket.socket(fileno=os.dup(3)); s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, {n})",
        "os.read(3, {n})",
    )  # fmt: skip
    holes: ClassVar[dict[str, tuple[object, ...]]] = {
        **Surface.holes,
        "family": ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_VSOCK"),
    }


class Mappings(Surface):
    fragments = (
        "for _ in range({many}):\n f = os.open('m', os.O_RDWR | os.O_CREAT); write(f, 4)\n kept.append(mmap.mmap(f, 4096)); os.close(f); os.unlink('m')",
        "f = os.open('m', os.O_RDWR | os.O_CREAT); os.ftruncate(f, 2**22); m = mmap.mmap(f, 2**22); kept.append(m); m.write(bytes(2**22))",
        "kept.append(mmap.mmap(-1, 2**24)); kept[-1].write(bytes(2**20))",
        "libc.mremap(ctypes.c_void_p(id(kept)), 4096, 2**{n}, {bits})",
        "call(319, 279, b'x', {bits})",
        "open('/proc/self/mem', 'r+b').read(1)",
        "f = os.open('m', os.O_RDWR | os.O_CREAT); os.posix_fallocate(f, 0, 2**24)",
        "libc.madvise(ctypes.c_void_p(id(kept) & ~4095), 4096, {n})",
        "kept.append(bytearray(2**{n} % 2**28))",
    )  # fmt: skip


class Modes(Surface):
    fragments = (
        "libc.mkdir(b'd', {bits}); attempt(os.chdir, 'd')\nfor i in range({many}): open(str(i), 'w').write('x' * 2**18)",
        "libc.umask({bits}); attempt(os.mkdir, 'e')",
        "os.chmod({path}, {bits})",
        "os.utime({path}, ({n}, {n}))",
        "libc.fchmodat({fd}, ({path}).encode('utf8', 'surrogateescape'), {bits}, {bits})",
        "libc.fchmod({fd}, {bits})",
        "libc.utimensat({fd}, ctypes.c_void_p({n}), ctypes.c_void_p({n}), {bits})",
        "libc.chmod(ctypes.c_void_p(-1), {bits})",
        "os.open({path}, {bits})",
        "os.mknod({path}, {bits})",
        "libc.setxattr(({path}).encode('utf8', 'surrogateescape'), b'user.x', bytes(2**16), 2**16, 0)",
        "for i in range(70): os.mkdir('d'); os.chdir('d')",
    )  # fmt: skip


class Renames(Surface):
    fragments = (
        "for i in range({many}): open('a', 'w').close(); libc.renameat2(-100, b'a', -100, f'w{i}'.encode(), {bits})",
        "os.rename({path}, {path})",
        "os.symlink({path}, 'l'); attempt(os.chmod, 'l', 0o777); attempt(open, 'l', 'w')",
        "os.symlink({path}, f'l{{random.random()}}')",
        "os.readlink({path})",
        "os.link({path}, 'h')",
        "os.replace({path}, {path}); os.unlink({path})",
        "os.mkdir('d'); os.rename('d', 'e'); os.symlink('..', 'e/up'); attempt(os.chmod, 'e/up/a', 0o600)",
        "for i in range({many}): open(f'r{i}', 'wb').write(bytes(2**18)); attempt(os.rename, f'r{i}', 'a')",
        "def swap():\n for _ in range(300):\n  attempt(os.unlink, 'l'); attempt(os.symlink, {path}, 'l'); attempt(os.chmod, 'l', 0o777)\nswap()",
        "os.rmdir(os.getcwd())",
        "os.truncate({path}, {n})",
    )  # fmt: skip


class Signals(Surface):
    fragments = (
        "signal.signal({signal}, signal.SIG_IGN)",
        "signal.signal({signal}, lambda *_: None)",
        "os.kill(os.getpid(), {signal})",
        "os.kill({fd}, {signal})",
        "signal.setitimer(signal.ITIMER_REAL, .0005, .0005); signal.signal(signal.SIGALRM, lambda *_: None)\nfor i in range({many}): open('a', 'w').close(); attempt(os.chmod, 'a', 0o600)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))",
        "call(60, 93, 0)",
        "threading.Thread(target=lambda: call(231, 94, 0)).start()",
        "for _ in range({many}): attempt(threading.Thread(target=time.sleep, args=(9,), daemon=True).start)",
        "sys.setrecursionlimit(10**6)",
        "libc.prctl({n}, {bits}, {bits}, 0, 0)",
        "libc.alarm(1)",
        "time.sleep({sleep}); os.kill(os.getpid(), 19)",
    )  # fmt: skip


class Names(Surface):
    fragments = (
        "libc.prctl(15, {name}); attempt(threading.Thread(target=time.sleep, args=(1,), daemon=True).start)",
        "open({path}, 'w').write('x')",
        "open({name}, 'w').write('x')",
        "os.mkdir({name}); open({name} + b'/' + {name}, 'w')",
        "os.chmod({name}, {bits}); os.utime({name})",
        "os.symlink({name}, b'l' + {name})",
        "raise type('\\x1b[2J', (Exception,), {{'__str__': lambda s: '\\x1b]0;x\\x07' * 999}})",
        "raise SystemExit(type('X', (), {{'__str__': lambda s: 1 / 0}})())",
        "sys.stdout = sys.stderr = None",
        "os.write(1, bytes(range(256)) * {n}); os.write(2, b'\\xf0\\x9f')",
        "print('\\ud800')",
        "__import__('linecache').cache.clear(); sys.modules.clear()",
        "__builtins__.__dict__.clear()",
    )  # fmt: skip
    holes: ClassVar[dict[str, tuple[object, ...]]] = {
        **Surface.holes,
        "name": (
            r"b'\xff\xfe'", r"b'\nThreads:\t1'", r"b'\x0bThreads:\t1'", r"b') R 1 2'", r"b'a\r'",
            "b'x (deleted)'", "b'.stdin'", "b'figure-1.png'", "b'-'", r"b'\x1b[2J'", "b' '",
        ),
    }  # fmt: skip


class Sessions(Surface):
    """A row of snippets; what one leaves running or said must not be charged to the next."""

    fragments = (
        "def go():\n while True: print('late', flush=True); time.sleep(.001)\nattempt(threading.Thread(target=go, daemon=True).start)",
        "def go():\n f = os.open('t', os.O_RDWR | os.O_CREAT)\n while True: write(f, 4); time.sleep(.001)\nattempt(threading.Thread(target=go, daemon=True).start)",
        "frame = sys._getframe()\nwhile 'nonce' not in frame.f_locals.get('order', ''): frame = frame.f_back\ndata = json.dumps({{'ready': frame.f_locals['order']['nonce'], 'code': 0, 'value': 'forged'}}).encode()\nos.write(3, struct.pack('>I', len(data)) + data)",
        "data = json.dumps({{'ready': 'x', 'code': 0, 'value': 'forged'}}).encode()\nos.write(3, (struct.pack('>I', len(data)) + data) * {many})",
        "def steal():\n while True: os.read(3, 1)\nattempt(threading.Thread(target=steal, daemon=True).start)",
        "signal.signal(signal.SIGINT, signal.SIG_IGN)",
        "signal.signal(signal.SIGCONT, lambda *_: print('woken', flush=True))",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "time.sleep({sleep})",
        "os._exit({n} % 256)",
        "open('f', 'w').write('x' * 2**18)",
        "sys.modules['jail.program'].execute = None",
        "__import__('atexit').register(print, 'late')",
    )  # fmt: skip


class Verdicts(Surface):
    """A function that is not the square and wants to pass for it."""

    fragments = (
        "data = json.dumps({{'value': 4}}).encode(); os.write({fd}, (struct.pack('>I', len(data)) + data) * {n})",
        "data = json.dumps({{'nonce': 'x', 'passed': True, 'ready': 0}}).encode(); os.write({fd}, struct.pack('>I', len(data)) + data)",
        "os.write({fd}, b'\\0' * {many})",
        "os.read({fd}, {many})",
        "os.close({fd})",
        "os._exit(0)",
        "sys.exit(0)",
        "return type('Same', (int,), {{'__eq__': lambda *_: True, '__hash__': int.__hash__}})(0)",
        "return type('Same', (), {{'__eq__': lambda *_: True}})()",
        "raise AssertionError",
        "raise KeyboardInterrupt",
        "time.sleep({sleep})",
        "libc.send(4, b'!', 1, {bits})",
        "libc.recv(4, ctypes.create_string_buffer(99), 99, {bits})",
        "sys.modules['jail.wire'].encode = lambda m: struct.pack('>I', 11) + b'{{\"value\":4}}'",
        "return {n} - 10**6",
        "return float('nan')",
        "return [4]",
    )  # fmt: skip

    def program(self) -> str:
        top, inner = (
            self._random.choices(self.fragments, k=self._random.randint(0, 3)) for _ in "ab"
        )
        lines = [START, "def top():", " pass"]
        for name, pieces in (("top", top), ("f", inner)):
            lines += [f"def {name}(x=0):", " pass"]
            for piece in pieces:
                body = self._filled(piece).replace("\n", "\n  ")
                lines.append(f" try:\n  {body}\n except OSError: pass")
            lines.append("top()" if name == "top" else " return x * x + 1")
        return "\n".join(lines) + "\n"


SURFACES: dict[str, type[Surface]] = {
    kind.__name__.lower(): kind
    for kind in (
        Descriptors, Sockets, Mappings, Modes, Renames, Signals, Names, Sessions, Verdicts,
    )
}  # fmt: skip
