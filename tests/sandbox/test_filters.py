"""The system-call filters, read by an interpreter of BPF of our own and by the kernel's numbers."""

from __future__ import annotations

import errno
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from optiq.sandbox.jail import seccomp
from optiq.sandbox.jail.seccomp import (
    ABSENT,
    ALLOW,
    ARCHITECTURES,
    KILL,
    NOTIFY,
    REFUSE,
    UNSUPPORTED,
)
from optiq.sandbox.jail.syscalls import AARCH64, X86_64

PID = 4242
MACHINES = sorted(ARCHITECTURES)


def evaluate(program: bytes, call: int, *arguments: int, audit: int) -> int:
    """What the kernel would return for a call: classic BPF over struct seccomp_data."""
    values = [a & (2**64 - 1) for a in (*arguments, *[0] * (6 - len(arguments)))]
    data = struct.pack("=iIQ6Q", call, audit, 0, *values)
    code = [struct.unpack_from("=HBBI", program, i) for i in range(0, len(program), 8)]
    at, accumulator = 0, 0
    while True:
        opcode, true, false, operand = code[at]
        at += 1
        if opcode == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, operand)
        elif opcode == 0x54:
            accumulator &= operand
        elif opcode == 0x05:
            at += operand
        elif opcode == 0x15:
            at += true if accumulator == operand else false
        elif opcode == 0x35:
            at += true if accumulator >= operand else false
        elif opcode == 0x06:
            return operand
        else:
            raise AssertionError(f"opcode {opcode:#x}")


def allowed(machine: str, name: str, *arguments: int) -> int:
    audit, numbers = ARCHITECTURES[machine]
    program = seccomp.allow_list(machine, PID)
    return evaluate(program, numbers[name], *arguments, audit=audit)


@pytest.mark.parametrize("machine", MACHINES)
def test_only_what_is_listed_passes(machine: str) -> None:
    audit, numbers = ARCHITECTURES[machine]
    program = seccomp.allow_list(machine, PID)
    names = [*seccomp._UNCONDITIONAL.split(), *seccomp.ON_BEHALF]
    plain = {numbers[n] for n in names if n in numbers}
    conditional = {numbers[n] for n in seccomp._conditional(PID) if n in numbers}
    for call in range(600):
        # All bits, and all but the owner's, which a folder must have and a mask must not.
        answers = {evaluate(program, call, *[a] * 6, audit=audit) for a in (2**31 - 1, 0x7FFFFE3F)}
        if call in plain:
            assert answers == {ALLOW}, call
        elif call not in conditional:
            assert answers == {REFUSE}, call
        else:
            assert answers & {REFUSE, ABSENT, UNSUPPORTED}, call
    assert len(plain) > 80


@pytest.mark.parametrize("machine", MACHINES)
def test_another_architecture_or_abi_kills(machine: str) -> None:
    audit, numbers = ARCHITECTURES[machine]
    for program in (seccomp.allow_list(machine, PID), seccomp.counted(machine, True)):
        assert evaluate(program, numbers["read"], audit=0x40000003) == KILL  # i386
        assert evaluate(program, 0x40000000 | numbers["read"], audit=audit) == KILL  # x32


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("name", "arguments", "passes"),
    [
        ("openat", (0, 0, 0), True),
        ("openat", (0, 0, 0o101), True),
        ("openat", (0, 0, 0o1101), True),
        ("openat", (0, 0, 0o1000), False),  # O_RDONLY | O_TRUNC: Landlock 1 and 2 let it cut
        ("openat", (0, 0, 0o10000000), False),  # O_PATH
        ("openat", (0, 0, 0o20000002), False),  # O_TMPFILE
        ("openat", (0, 0, 3), False),  # neither to read nor to write
        ("openat", (0, 0, 0o103, 0o600), False),
        ("mkdirat", (0, 0, 0o755), True),
        ("mkdirat", (0, 0, 0o300), False),  # a folder that nobody can list
        ("mkdirat", (0, 0, 0), False),
        ("umask", (0o077,), True),
        ("umask", (0o777,), False),
        ("renameat2", (0, 0, 0, 0, 2), True),
        ("renameat2", (0, 0, 0, 0, 4), False),  # RENAME_WHITEOUT
        ("renameat2", (0, 0, 0, 0, 5), False),
        ("close_range", (3, 9, 4), True),
        ("close_range", (3, 9, 2), False),  # CLOSE_RANGE_UNSHARE
        ("close_range", (3, 9, 6), False),
        ("clone", (0x3D0F00,), True),  # a thread, as glibc makes one
        ("clone", (17,), False),
        ("clone", (0x10900,), False),  # a thread with descriptors of its own
        ("clone", (0x10000000 | 0x3D0F00,), False),
        ("kill", (PID, 9), True),
        ("kill", (1, 9), False),
        ("kill", (-1, 9), False),
        ("tgkill", (PID, PID, 6), True),
        ("tgkill", (1, 1, 6), False),
        ("ioctl", (0, 0x5401), True),
        ("ioctl", (0, 0x5412), False),  # TIOCSTI
        ("ioctl", (0, 0x541C), False),  # TIOCLINUX
        ("fcntl", (0, 1030), True),
        ("fcntl", (0, 8), False),  # F_SETOWN
        ("prctl", (15,), True),
        ("prctl", (38,), False),
        ("prlimit64", (0, 9, 0, 1), True),
        ("prlimit64", (0, 9, 1, 0), False),
        ("prlimit64", (0, 9, 1 << 32, 0), False),  # a pointer whose lower half is 0
        ("prlimit64", (1, 9, 0, 1), False),
        ("socketpair", (1, 1 | 0o2000000), True),
        ("socketpair", (1, 2), False),  # a datagram socket could send to an address
        ("socketpair", (2, 1), False),
        ("sendto", (0, 0, 0, 0, 0), True),
        ("sendto", (0, 0, 0, 0, 1 << 40), False),
        ("sendto", (0, 0, 0, 1, 0), False),  # MSG_OOB
        ("sendto", (0, 0, 0, 0x4001, 0), False),
        ("recvfrom", (0, 0, 0, 0x40), True),
        ("recvfrom", (0, 0, 0, 1), False),
        ("getpgid", (PID,), True),
        ("getsid", (0,), True),
        ("getpgid", (1,), False),
        ("getsid", (1,), False),
        ("sched_getaffinity", (1,), False),
    ],
)
def test_arguments_decide(
    machine: str, name: str, arguments: tuple[int, ...], passes: bool
) -> None:
    assert allowed(machine, name, *arguments) == (ALLOW if passes else REFUSE)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_c_library_is_sent_to_calls_that_can_be_judged(machine: str) -> None:
    assert allowed(machine, "clone3") == allowed(machine, "openat2") == ABSENT
    assert ABSENT & 0xFFFF == errno.ENOSYS


@pytest.mark.parametrize("machine", MACHINES)
def test_a_file_system_without_attributes(machine: str) -> None:
    assert allowed(machine, "listxattr") == allowed(machine, "fgetxattr") == UNSUPPORTED
    audit, _ = ARCHITECTURES[machine]
    setxattr = {"x86_64": 188, "aarch64": 5}[machine]
    assert evaluate(seccomp.allow_list(machine, PID), setxattr, audit=audit) == REFUSE


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("entries", [True, False])
def test_what_the_host_is_asked_about(machine: str, entries: bool) -> None:
    audit, numbers = ARCHITECTURES[machine]
    program = seccomp.counted(machine, entries)

    def answer(name: str, *arguments: int) -> int:
        return evaluate(program, numbers[name], *arguments, audit=audit)

    made = {answer("openat", 0, 0, 0o101), answer("mkdirat"), answer("symlinkat")}
    assert made == {NOTIFY if entries else ALLOW}
    assert answer("clone", 0x3D0F00) == NOTIFY
    for name in ("fchmod", "fchmodat", "utimensat", "readlinkat"):
        assert answer(name) == NOTIFY
        assert allowed(machine, name) == ALLOW
    assert answer("openat", 0, 0, 0o1) == answer("clone", 17) == answer("read") == ALLOW


def test_numbers_are_the_kernels_on_x86_64() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers of x86-64")
    found = {m[1]: int(m[2]) for m in re.finditer(r"#define __NR_(\w+) (\d+)", header.read_text())}
    assert {name: found[name] for name in X86_64} == X86_64


def test_numbers_are_the_kernels_on_aarch64() -> None:
    header, compiler = Path("/usr/include/asm-generic/unistd.h"), shutil.which("cc")
    if not header.exists() or compiler is None:
        pytest.skip("no kernel headers or no compiler")
    wants = ["RENAMEAT", "NEW_STAT", "SET_GET_RLIMIT", "SYS_CLONE3"]  # arm64's own choice
    options = ["-D__BITS_PER_LONG=64", *(f"-D__ARCH_WANT_{w}" for w in wants)]
    done = subprocess.run(
        [compiler, "-E", "-dM", *options, header], capture_output=True, text=True, check=True
    )
    defined = dict(re.findall(r"#define (__NR\w*) (\w+)", done.stdout))

    def number(name: str) -> int:
        value = defined[f"__NR_{name}"]
        return int(value if value.isdigit() else defined[value])

    assert {name: number(name) for name in AARCH64} == AARCH64
