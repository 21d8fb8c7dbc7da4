"""Locks the calling process into a jail: Landlock, seccomp, no capabilities, hard limits.

System calls through ctypes; no program beside Python is needed, and no privilege. Each step
raises where the kernel refuses it, so a process is either fully locked in or ends.
"""

from __future__ import annotations

import array
import ctypes
import errno
import math
import os
import resource
import socket
import struct
from collections.abc import Sequence
from typing import Any

from . import seccomp

_libc = ctypes.CDLL(None, use_errno=True)

_CAP_SYS_ADMIN = 1 << 21
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT = 1, 38, 24, 47
_CAPABILITY_VERSION = 0x20080522
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # on both architectures
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_FILTER, _NEW_LISTENER = 1, 8
_WAIT_KILLABLE = 32  # a question that was taken is not withdrawn by a signal; Linux 5.19

# Landlock's rights by the version of its interface that brought them.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SYM = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_TCP, _SCOPES = 0b11, 0b11
_READ = _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_ALL_OF_A_FOLDER = (
    _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM
) | (_REFER | _TRUNCATE)


def landlock_version() -> int:
    """Version of the kernel's Landlock interface; 0 where it has none."""
    return max(0, int(_libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)))


def drop_privileges(mounting: bool = False) -> None:
    """Give up all capabilities for good, in every set; a program with setuid gives none back.

    `mounting` keeps the one of the own namespace that lets a fork mount its work folder.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_CAP_AMBIENT, 4)  # clear all
    # Only a privileged process may empty the bounding set, and only for it does the set matter.
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            break
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    kept = _CAP_SYS_ADMIN if mounting else 0
    _check(_libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)), "capset")


def die_with_parent(parent: int) -> None:
    """At once, where it has died already."""
    _prctl(_PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:
        os._exit(1)


def limit(limits: dict[str, Any]) -> None:
    """Limits that the kernel keeps: memory, CPU time, sizes and numbers of open files."""
    seconds = math.ceil(limits["cpu"])
    for kind, soft, hard in (
        (resource.RLIMIT_AS, limits["memory"], limits["memory"]),
        (resource.RLIMIT_CPU, seconds, seconds + 1),  # SIGXCPU, then SIGKILL
        (resource.RLIMIT_FSIZE, limits["disk"], limits["disk"]),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_STACK, 8 * 2**20, 8 * 2**20),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(kind, (soft, hard))


def landlock(work: str, readable: Sequence[str]) -> int:
    """See `readable`, own `work`, reach nothing else; the version that was used."""
    version = landlock_version()
    if version < 1:
        raise OSError("the kernel has no Landlock")
    handled = (1 << 13) - 1
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        handled |= right if version >= since else 0
    fields = [handled, *([_TCP] if version >= 4 else []), *([_SCOPES] if version >= 6 else [])]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = _libc.syscall(
        _LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)
    )
    _check(ruleset, "landlock_create_ruleset")
    allowed = [(path, _READ) for path in readable]
    allowed += [("/dev/null", _READ_FILE | _WRITE_FILE), ("/dev/urandom", _READ_FILE)]
    for path, rights in [*allowed, (work, _ALL_OF_A_FOLDER)]:
        _allow_beneath(ruleset, path, rights & handled)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
    return version


def _allow_beneath(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= _OF_FILES
    rule = struct.pack("=Qi", rights, place)
    _check(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
    os.close(place)


def ask_host(channel: int, entries: bool) -> None:
    """Ask the host about some calls from now on; with `entries`, also about new files and folders.

    The descriptor on which it answers goes to it over `channel`, and with it one of the work
    folder. Before `limit`: the kernel allows a user no more descriptors under way than the sender
    may have open.
    """
    work = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    program = seccomp.counted(_architecture(), entries)
    listener = _install(program, _NEW_LISTENER | _WAIT_KILLABLE)
    if listener < 0 and ctypes.get_errno() == errno.EINVAL:
        listener = _install(program, _NEW_LISTENER)
    _check(listener, "seccomp listener")
    with socket.socket(fileno=os.dup(channel)) as host:
        rights = array.array("i", [listener, work])
        host.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    os.close(listener)
    os.close(work)


def filter_calls() -> None:
    """Refuse every call that is not on the list."""
    _check(_install(seccomp.allow_list(_architecture(), os.getpid()), 0), "seccomp")


def _architecture() -> str:
    machine = os.uname().machine
    if machine not in seccomp.ARCHITECTURES:
        raise OSError(f"no filter for {machine}; there is one for x86_64 and aarch64")
    return machine


def _install(program: bytes, flags: int) -> int:
    code = ctypes.create_string_buffer(program, len(program))
    description = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    return int(_libc.syscall(_SECCOMP[_architecture()], _FILTER, flags, description))


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
