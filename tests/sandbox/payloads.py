"""The attacks on files, network and processes: a program for the inside of a jail, nowhere else.

Each has the number it has in docs/sandbox-attacks.md and some attempts: a function and its
arguments. An attempt that returns has succeeded, whatever it returns; an OSError is a refusal;
anything else is an attempt that could not be made, and a mistake in here. All are harmless where
they succeed: the clock is set to the time it shows, the host name to the one it has. `T` names what
`campaign.py` has laid out, and looks at afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import resource
import socket
import struct
import sys
import threading
import time
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"
# By name: the number on x86-64, on aarch64.
CALLS = dict(
    acct=(163, 89), add_key=(248, 217), adjtimex=(159, 171), bpf=(321, 280), chroot=(161, 51),
    clock_settime=(227, 112), clone=(56, 220), clone3=(435, 435), creat=(85, 0),
    execveat=(322, 281), fanotify_init=(300, 262), fsopen=(430, 430), inotify_init1=(294, 26),
    io_uring_setup=(425, 425), keyctl=(250, 219), memfd_create=(319, 279), mount=(165, 40),
    mq_open=(240, 180), msgget=(68, 186), name_to_handle_at=(303, 264), open=(2, 0),
    open_by_handle_at=(304, 265), open_tree=(428, 428), openat=(257, 56), openat2=(437, 437),
    perf_event_open=(298, 241), personality=(135, 92), pidfd_getfd=(438, 438),
    pidfd_open=(434, 434), pivot_root=(155, 41), prctl=(157, 167), process_madvise=(440, 440),
    process_vm_readv=(310, 270), ptrace=(101, 117), quotactl=(179, 60), seccomp=(317, 277),
    semget=(64, 190), sethostname=(170, 161), setns=(308, 268), setpriority=(141, 140),
    setxattr=(188, 5), shmget=(29, 194), syslog=(103, 116), tgkill=(234, 131), truncate=(76, 45),
    umount2=(166, 39), unshare=(272, 97), userfaultfd=(323, 282),
)  # fmt: skip


def call(name: str, *arguments: Any) -> int:
    """A system call by its number, so that no library stands in the way."""
    number = CALLS[name][0 if X86 else 1]
    if not number:
        raise OSError(errno.ENOSYS, "not on this machine")
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def zeros(size: int, begin: bytes = b"") -> Any:
    return ctypes.create_string_buffer(begin + bytes(size - len(begin)))


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(200)


def make(path: str) -> None:
    with open(path, "xb") as file:
        file.write(b"x")


def open_to_write(path: str) -> None:
    """Without writing, so that nothing is lost where it succeeds."""
    os.close(os.open(path, os.O_WRONLY | os.O_APPEND))


def mode_by_descriptor(path: str) -> None:
    """To the one it has."""
    with open(path, "rb") as file:
        os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode)


def times_by_descriptor(path: str) -> None:
    """To the ones it has."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        os.utime(file.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))


def through_a_link(target: str, attempt: Any, *arguments: Any) -> None:
    name = f"link{len(os.listdir('.'))}"
    os.symlink(target, name)
    attempt(name, *arguments)


def through_a_hard_link(target: str) -> None:
    os.link(target, "hard")
    open_to_write("hard")


def move_out(target: str) -> None:
    make("mine")
    os.rename("mine", target)


def environment_with(word: str) -> list[str]:
    found = [name for name, value in os.environ.items() if word in value]
    if not found:
        raise OSError(errno.ENOENT, "not there")
    return found


def other_descriptors() -> list[int]:
    """Beside the standard streams and the channel to the host."""
    found = []
    for descriptor in range(4, 4096):
        try:
            os.fstat(descriptor)
            found.append(descriptor)
        except OSError as error:
            closed = error
    if not found:
        raise closed
    return found


def by_handle(path: str) -> None:
    handle, mount = zeros(136, struct.pack("=I", 128)), ctypes.c_int()
    call("name_to_handle_at", -100, path.encode(), handle, ctypes.byref(mount), 0)
    call("open_by_handle_at", -100, handle, os.O_RDONLY)


def files(t: dict[str, Any]) -> dict[int, list[tuple[Any, ...]]]:
    up, library, outside = "../" * 20, os.__file__, t["outside"]
    devices = ["mem", "kmem", "kmsg", "vda", "sda", "nvme0n1", "kvm", "fuse", "ptmx", "full"]
    return {
        1: [(read, "/etc/passwd"), (read, "/etc/shadow"), (read, "/etc/hosts")],
        2: [
            (read, t["secret"]),
            (os.listdir, outside),
            (os.listdir, "/"),
            (call, "openat", -100, t["secret"].encode(), os.O_RDONLY),
            (call, "openat2", -100, t["secret"].encode(), zeros(24), ctypes.c_size_t(24)),
            (call, "open", t["secret"].encode(), os.O_RDONLY),
            (os.open, t["secret"], os.O_PATH),
            (os.open, outside, os.O_TMPFILE | os.O_RDWR),
        ],
        3: [(os.listdir, t["home"]), (os.listdir, "/root"), (os.listdir, "/home")],
        4: [(environment_with, t["word"]), (read, "/proc/self/environ"), (read, "/proc/1/environ")],
        5: [
            (make, outside + "/new"),
            (os.mkdir, outside + "/folder"),
            (make, "/tmp/optiq-attack"),
            (make, "/var/tmp/optiq-attack"),
            (call, "creat", (outside + "/new").encode(), 0o600),
        ],
        6: [
            (open_to_write, t["canary"]),
            (os.truncate, t["canary"], 0),
            (call, "truncate", t["canary"].encode(), 0),
            (os.open, t["canary"], os.O_RDONLY | os.O_TRUNC),
            (os.open, t["canary"], os.O_WRONLY | os.O_APPEND),
        ],
        7: [(os.unlink, t["canary"]), (os.rmdir, outside)],
        8: [
            (move_out, outside + "/moved"),
            (os.rename, t["canary"], "taken"),
            (os.replace, t["canary"], "taken"),
        ],
        9: [
            (through_a_link, t["secret"], read),
            (through_a_link, t["canary"], open_to_write),
            (through_a_link, outside, lambda link: make(link + "/new")),
        ],
        10: [(through_a_hard_link, t["canary"]), (through_a_hard_link, library)],
        11: [(read, up + t["secret"]), (os.listdir, ".."), (os.listdir, up)],
        12: [
            (os.chmod, t["canary"], 0o777),
            (os.chown, t["canary"], 12345, -1),
            (mode_by_descriptor, library),
            (call, "setxattr", t["canary"].encode(), b"user.x", b"y", 1, 0),
        ],
        13: [(os.utime, t["canary"], (1, 1)), (times_by_descriptor, library)],
        14: [(os.stat, t["canary"]), (os.lstat, t["secret"]), (os.stat, "/etc/shadow")],
        15: [(make, t["site"] + "/optiq-attack.pth"), (make, t["site"] + "/usercustomize.py")],
        16: [
            (open_to_write, library),
            (open_to_write, json.__file__),
            (make, os.path.dirname(library) + "/optiq-attack.py"),
        ],
        17: [(other_descriptors,)],
        18: [
            (open_to_write, "/proc/self/mem"),
            (read, "/proc/self/maps"),
            (os.listdir, "/proc/self/fd"),
            (os.readlink, "/proc/self/exe"),
        ],
        19: [
            (make, "/dev/shm/optiq-attack"),
            (os.listdir, "/dev/shm"),
            (os.listdir, "/dev"),
            (call, "mq_open", b"optiq", os.O_CREAT, 0o600, None),
        ],
        20: [
            *((read, "/dev/" + name) for name in devices),
            (os.mknod, "device", 0o60600, os.makedev(1, 1)),
            (os.mkfifo, "fifo"),
            (read, "/sys/kernel/vmcoreinfo"),
        ],
        21: [(by_handle, t["secret"]), (by_handle, "/"), (by_handle, ".")],
    }


def connect(family: int, address: Any, kind: int = socket.SOCK_STREAM) -> None:
    with socket.socket(family, kind) as s:
        s.settimeout(1)
        s.connect(address)
        s.send(b"attack")


def listen(family: int, address: Any) -> None:
    with socket.socket(family) as s:
        s.bind(address)
        s.listen()


def through_a_pair(kind: int, address: Any) -> None:
    """From a socket that one may have to one that one may not reach."""
    with socket.socketpair(socket.AF_UNIX, kind)[0] as s:
        s.sendto(b"attack", address)


def network(t: dict[str, Any]) -> dict[int, list[tuple[Any, ...]]]:
    inet, unix = socket.AF_INET, socket.AF_UNIX
    stream, datagram, raw = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW
    abstract = "\0" + t["abstract"]
    return {
        22: [(connect, inet, ("127.0.0.1", t["port"])), (connect, 10, ("::1", t["port"]))],
        23: [(connect, inet, ("127.0.0.1", t["udp"]), datagram)],
        24: [(socket.getaddrinfo, "localhost", 80), (read, "/etc/resolv.conf")],
        25: [
            (connect, unix, t["unix"]),
            (through_a_pair, stream, t["unix"]),
            (through_a_pair, datagram, t["unix"]),
        ],
        26: [
            (connect, unix, abstract),
            (through_a_pair, stream, abstract),
            (through_a_pair, datagram, abstract),
        ],
        27: [(listen, inet, ("127.0.0.1", 0)), (listen, unix, "here"), (listen, unix, "\0here")],
        28: [(socket.socket, socket.AF_NETLINK, raw, 0)],
        29: [(socket.socket, inet, raw, 1), (socket.socket, socket.AF_PACKET, raw, 0)],
        30: [(socket.socket, family, stream) for family in (40, 38, 31, 16, 2, 10, 1)],
        31: [
            (call, "shmget", 0, 4096, 0o1600),
            (call, "msgget", 0, 0o1600),
            (call, "semget", 0, 1, 0o1600),
        ],
        32: [(call, "keyctl", 0, -3, 0), (call, "add_key", b"user", b"optiq", b"x", 1, -3)],
        33: [
            (fcntl.ioctl, 0, 0x5412, b"x"),
            (fcntl.ioctl, 1, 0x5412, b"x"),
            (read, "/dev/tty"),
            (fcntl.fcntl, 1, fcntl.F_SETOWN, t["victim"]),
        ],
    }


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def clone(flags: int) -> None:
    if call("clone", ctypes.c_ulong(flags), 0, 0, 0, 0) == 0:
        os._exit(0)


def daemon(late: str) -> None:
    if os.fork() == 0:
        os.setsid()
        time.sleep(0.2)
        make(late)
        os._exit(0)


def threads(allowed: int) -> int:
    """More of them than allowed, or a refusal."""
    stop, started = threading.Event(), 0
    threading.stack_size(2**16)
    try:
        while started < 500:
            threading.Thread(target=stop.wait, daemon=True).start()
            started += 1
    except RuntimeError as error:
        if started <= allowed:
            raise OSError(errno.EAGAIN, f"{error} after {started}") from None
    finally:
        stop.set()
    return started


def processes(t: dict[str, Any]) -> dict[int, list[tuple[Any, ...]]]:
    victim = t["victim"]
    shell = ["sh", "-c", f"echo x > {t['outside']}/exec"]
    memory = zeros(16)
    vector = zeros(16, struct.pack("@PN", ctypes.addressof(memory), 16))
    return {
        34: [
            (os.execv, "/bin/sh", shell),
            (os.posix_spawn, "/bin/sh", shell, {}),
            (os.execv, sys.executable or "/usr/bin/python3", ["python", "-c", "1"]),
        ],
        35: [
            (fork,),
            (clone, 17),
            (clone, 0x4111),
            (clone, 0x10000000 | 17),
            (call, "clone3", zeros(64, struct.pack("=5Q", 0, 0, 0, 0, 17)), ctypes.c_size_t(64)),
        ],
        36: [(fork,)] * 50,
        37: [(threads, t["threads"])],
        38: [
            *((os.kill, victim, number) for number in (0, 15, 9)),
            *((os.kill, other, 0) for other in (-1, 1, os.getppid())),
            (os.killpg, 0, 0),
            (call, "tgkill", victim, victim, 0),
            (call, "pidfd_open", victim, 0),
        ],
        39: [
            (call, "ptrace", 16, victim, 0, 0),
            (call, "ptrace", 0, 0, 0, 0),
            (call, "pidfd_getfd", 3, 0, 0),
        ],
        40: [
            (call, "process_vm_readv", victim, vector, 1, vector, 1, 0),
            (call, "process_vm_readv", os.getpid(), vector, 1, vector, 1, 0),
            (call, "process_madvise", -1, vector, 1, 4, 0),
        ],
        41: [
            (read, f"/proc/{victim}/environ"),
            (read, f"/proc/{victim}/cmdline"),
            (read, f"/proc/{os.getppid()}/environ"),
        ],
        42: [(os.listdir, "/proc"), (read, "/proc/1/comm"), (os.getpriority, 0, victim)],
        43: [(daemon, t["outside"] + "/late"), (os.setsid,), (os.setpgid, 0, 0)],
        45: [(call, "memfd_create", b"x", 0), (call, "execveat", 3, b"", 0, 0, 0x1000)],
        46: [(call, "io_uring_setup", 4, zeros(256))],
        47: [(call, "bpf", 0, zeros(128), 128)],
        48: [(call, "perf_event_open", zeros(128, struct.pack("=II", 1, 128)), 0, -1, -1, 0)],
        49: [(call, "userfaultfd", 1), (call, "fanotify_init", 0, 0), (call, "inotify_init1", 0)],
    }


def raise_limit(kind: int) -> None:
    try:
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except ValueError as error:  # as Python calls a refusal
        raise OSError(errno.EPERM, str(error)) from None


def privileges(t: dict[str, Any]) -> dict[int, list[tuple[Any, ...]]]:
    here, name = os.getcwd().encode(), os.uname().nodename.encode()
    now = struct.pack("=qq", int(time.time()), 0)
    namespaces = (0x10000000, 0x20000, 0x400, 0x40000000, 0x2000000)
    limits = (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE)
    return {
        50: [*((call, "unshare", bits) for bits in namespaces), (call, "setns", 3, 0)],
        51: [
            (call, "mount", b"none", here, b"tmpfs", 0, None),
            (call, "fsopen", b"tmpfs", 0),
            (call, "open_tree", -100, b".", 1),
            (call, "umount2", here, 8),
        ],
        52: [(call, "chroot", b"."), (call, "pivot_root", b".", b".")],
        53: [
            (os.setuid, 1),
            (os.setresuid, 0, 0, 0),
            (os.setgid, 1),
            (os.setgroups, []),
            (call, "prctl", 38, 0, 0, 0, 0),
            (call, "seccomp", 0, 0, None),
            (call, "personality", 0x40000),
        ],
        54: [
            (call, "setpriority", 0, 0, -5),
            (os.nice, -1),
            (os.sched_setaffinity, 0, os.sched_getaffinity(0)),
            (os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1)),
        ],
        55: [(call, "clock_settime", 0, now), (call, "adjtimex", zeros(256))],
        56: [
            (call, "sethostname", name, len(name)),
            (call, "syslog", 3, None, 0),
            (call, "acct", None),
            (call, "quotactl", 0, None, 0, None),
        ],
        69: [(raise_limit, kind) for kind in limits],
    }


def campaign(t: dict[str, Any]) -> None:
    """Make all attempts; a line of JSON for each, so that one that ends the process is missed.

    First the sandbox's own refusals are taken away, so that what refuses is the kernel.
    """
    sys.modules["jail.policy"].RULES.clear()  # type: ignore[attr-defined]
    for group in (files, network, processes, privileges):
        for number, attempts in group(t).items():
            for index, (attempt, *arguments) in enumerate(attempts):
                try:
                    outcome = ["got", repr(attempt(*arguments))[:200]]
                except OSError as error:
                    outcome = ["refused", errno.errorcode.get(error.errno or 0, repr(error))]
                except BaseException as error:
                    outcome = ["broken", repr(error)]
                print(json.dumps([number, index, *outcome]), flush=True)
    print(json.dumps("end"), flush=True)
