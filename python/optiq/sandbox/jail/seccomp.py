"""The two system-call filters of a jail, as classic BPF programs.

`allow_list` refuses every call that Python does not need, and of some calls all but a few
arguments. `counted` hands the calls that make a file, a folder or a thread to the host, which says
yes while the run is within its limits. Both look at registers only, never at memory, so no second
thread can change what was judged. Where the two disagree, the kernel takes the stricter answer.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from .syscalls import AARCH64, X86_64

ALLOW = 0x7FFF0000
KILL = 0x80000000
NOTIFY = 0x7FC00000
REFUSE = 0x00050000 | errno.EPERM
ABSENT = 0x00050000 | errno.ENOSYS  # the C library falls back to a call that a filter can judge
UNSUPPORTED = 0x00050000 | errno.EOPNOTSUPP  # as of a file system without extended attributes

_LOAD, _JUMP, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x54, 0x06
_X32 = 0x40000000  # calls of the x32 ABI, which has numbers of its own

ARCHITECTURES = {"x86_64": (0xC000003E, X86_64), "aarch64": (0xC00000B7, AARCH64)}

CLONE_THREAD = 0x00010000
_THREAD = CLONE_THREAD | 0xF00  # memory, folder, descriptors and signal handlers in common
_CLONE_NEW = 0x7E020000  # any new namespace
O_CREAT = 0o100
_O_TRUNC = 0o1000
_O_PATH = 0o10000000  # Landlock does not judge such an opening
_O_TMPFILE = 0o20000000  # a file that no folder shows
F_DUPFD_CLOEXEC = 1030
PR_SET_NAME = 15
AF_UNIX = SOCK_STREAM = 1
_MSG_OOB = 1  # such a byte wakes the reader, who then finds nothing to read
_CLOSE_RANGE_CLOEXEC = 4  # not UNSHARE: descriptors of its own would hide a thread's files
_OWNER = 0o700  # without these bits the host could not list a folder


@dataclass(frozen=True)
class Test:
    """`argument & mask` is one of `values`; the lower 32 bits, or the upper ones of a pointer."""

    argument: int
    values: Iterable[int]
    mask: int = 0xFFFFFFFF
    upper: bool = False


@dataclass(frozen=True)
class Rule:
    """`action` for a call that passes all tests."""

    action: int = ALLOW
    tests: tuple[Test, ...] = field(default=())


def _null(argument: int) -> tuple[Test, Test]:
    return Test(argument, [0]), Test(argument, [0], upper=True)


def _opening() -> Rule:
    """Of a file: by its path, visible in a folder, truncated only by who may write to it."""
    # Access mode 3 opens without a right to read or write, which Landlock lets pass.
    kinds = [access | cut for access in range(3) for cut in (0, _O_TRUNC) if access or not cut]
    return Rule(ALLOW, (Test(2, [0], _O_PATH | _O_TMPFILE), Test(2, kinds, _O_TRUNC | 3)))


_UNCONDITIONAL = """
    read write close fstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
    rt_sigreturn pread64 pwrite64 readv writev sched_yield mremap msync madvise dup nanosleep
    getitimer setitimer getpid sendfile shutdown exit uname flock fsync fdatasync ftruncate getcwd
    chdir fchdir gettimeofday getrusage sysinfo times getuid getgid geteuid getegid getppid
    getgroups getresuid getresgid rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack gettid
    futex getdents64 set_tid_address restart_syscall clock_gettime clock_getres clock_nanosleep
    exit_group epoll_ctl newfstatat unlinkat renameat symlinkat faccessat pselect6 ppoll
    set_robust_list epoll_pwait eventfd2 epoll_create1 dup3 pipe2 preadv pwritev getrandom
    copy_file_range preadv2 pwritev2 statx rseq faccessat2 epoll_pwait2 stat lstat access pipe
    select dup2 pause alarm getrlimit rename rmdir unlink symlink getpgrp arch_prctl time
    epoll_wait
"""

# Done by the host. The other filter lets them pass, since of two answers the stricter counts.
ON_BEHALF = ("chmod", "fchmod", "fchmodat", "utimensat", "readlink", "readlinkat")
# With the number of another process they would tell whether there is one.
_OF_A_PROCESS = ("getpgid", "getsid", "sched_getaffinity")
# shutil.copy2 goes on without attributes where there are none.
_ATTRIBUTES = ("getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr", "flistxattr")


def _conditional(pid: int) -> dict[str, list[Rule]]:
    terminal = [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    return {
        "openat": [_opening()],
        "mkdir": [Rule(ALLOW, (Test(1, [_OWNER], _OWNER),))],
        "mkdirat": [Rule(ALLOW, (Test(2, [_OWNER], _OWNER),))],
        "umask": [Rule(ALLOW, (Test(0, [0], _OWNER),))],
        "renameat2": [Rule(ALLOW, (Test(4, range(3)),))],  # not 4, which leaves a device behind
        "close_range": [Rule(ALLOW, (Test(2, [0, _CLOSE_RANGE_CLOEXEC]),))],
        "clone": [Rule(ALLOW, (Test(0, [_THREAD], _THREAD | _CLONE_NEW),))],
        "kill": [Rule(ALLOW, (Test(0, [pid]),))],
        "tgkill": [Rule(ALLOW, (Test(0, [pid]),))],
        "ioctl": [Rule(ALLOW, (Test(1, terminal),))],
        "fcntl": [Rule(ALLOW, (Test(1, [*range(8), F_DUPFD_CLOEXEC]),))],
        "prctl": [Rule(ALLOW, (Test(0, [PR_SET_NAME]),))],
        "prlimit64": [Rule(ALLOW, (Test(0, [0, pid]), *_null(2)))],
        "socketpair": [Rule(ALLOW, (Test(0, [AF_UNIX]), Test(1, [SOCK_STREAM], 0xF)))],
        "sendto": [Rule(ALLOW, (Test(3, [0], _MSG_OOB), *_null(4)))],
        "recvfrom": [Rule(ALLOW, (Test(3, [0], _MSG_OOB),))],
        **{call: [Rule(ALLOW, (Test(0, [0, pid]),))] for call in _OF_A_PROCESS},
        **{call: [Rule(UNSUPPORTED)] for call in _ATTRIBUTES},
        **{call: [Rule()] for call in ON_BEHALF},
        "clone3": [Rule(ABSENT)],
        "openat2": [Rule(ABSENT)],
    }


def allow_list(architecture: str, pid: int) -> bytes:
    """The filter that refuses what is not listed; `pid` may signal itself alone."""
    return _program(architecture, _UNCONDITIONAL, _conditional(pid), REFUSE)


def counted(architecture: str, entries: bool) -> bytes:
    """The filter that asks the host before a thread or, with `entries`, a file or folder is made.

    And it asks the host to change modes and times and to read links, which the host does itself,
    and for the work folder only: the kernel would do it wherever the user may.
    """
    ask = [Rule(NOTIFY)]
    rules = dict.fromkeys(ON_BEHALF, ask)
    rules["clone"] = [Rule(NOTIFY, (Test(0, [CLONE_THREAD], CLONE_THREAD),))]
    if entries:
        rules |= dict.fromkeys(("mkdir", "mkdirat", "symlink", "symlinkat"), ask)
        rules["openat"] = [Rule(NOTIFY, (Test(2, [O_CREAT], O_CREAT),))]
    return _program(architecture, "", rules, ALLOW)


def _program(
    architecture: str, allowed: str, rules: dict[str, list[Rule]], otherwise: int
) -> bytes:
    audit, numbers = ARCHITECTURES[architecture]
    plain = [numbers[name] for name in allowed.split() if name in numbers]
    code = [
        _instruction(_LOAD, 4),
        _instruction(_EQUAL, audit, 1, 0),
        _instruction(_RETURN, KILL),
        _instruction(_LOAD, 0),
        _instruction(_AT_LEAST, _X32, 0, 1),
        _instruction(_RETURN, KILL),
        *(_instruction(_EQUAL, n, len(plain) - i, 0) for i, n in enumerate(plain)),
        _instruction(_JUMP, 1),
        _instruction(_RETURN, ALLOW),
    ]
    for name, alternatives in rules.items():
        if name in numbers:
            body = [i for rule in alternatives for i in _rule(rule)]
            body.append(_instruction(_RETURN, otherwise))
            code += [_instruction(_EQUAL, numbers[name], 0, len(body)), *body]
    return b"".join([*code, _instruction(_RETURN, otherwise)])


def _rule(rule: Rule) -> list[bytes]:
    """Instructions that return the rule's action, or fall through when a test fails."""
    code = [_instruction(_RETURN, rule.action)]
    for test in reversed(rule.tests):
        values = list(test.values)
        block = [_instruction(_LOAD, 16 + 8 * test.argument + 4 * test.upper)]
        block.append(_instruction(_AND, test.mask))
        for left, value in zip(range(len(values) - 1, -1, -1), values, strict=True):
            block.append(_instruction(_EQUAL, value, left, 0 if left else len(code)))
        code = block + code
    return code


def _instruction(code: int, operand: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, true, false, operand)
