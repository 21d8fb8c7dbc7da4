"""Numbers of the system calls that the filters name: Linux, x86-64 and aarch64."""

from __future__ import annotations


def _table(text: str) -> dict[str, int]:
    return {name: int(number) for name, number in (item.split("=") for item in text.split())}


X86_64 = _table(
    """
    read=0 write=1 close=3 fstat=5 poll=7 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12
    rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 ioctl=16 pread64=17 pwrite64=18 readv=19
    writev=20 sched_yield=24 mremap=25 msync=26 madvise=28 dup=32 nanosleep=35 getitimer=36
    setitimer=38 getpid=39 sendfile=40 sendto=44 recvfrom=45 shutdown=48 socketpair=53 clone=56
    exit=60 kill=62 uname=63 fcntl=72 flock=73 fsync=74 fdatasync=75 ftruncate=77 getcwd=79
    chdir=80 fchdir=81 umask=95 gettimeofday=96 getrusage=98 sysinfo=99 times=100 getuid=102
    getgid=104 geteuid=107 getegid=108 getppid=110 getgroups=115 getresuid=118 getresgid=120
    getpgid=121 getsid=124 rt_sigpending=127 rt_sigtimedwait=128 rt_sigsuspend=130
    sigaltstack=131 gettid=186 futex=202 sched_getaffinity=204 getdents64=217
    set_tid_address=218 restart_syscall=219 clock_gettime=228 clock_getres=229
    clock_nanosleep=230 exit_group=231 epoll_ctl=233 tgkill=234 openat=257 mkdirat=258
    newfstatat=262 unlinkat=263 renameat2=316 symlinkat=266 faccessat=269
    pselect6=270 ppoll=271 set_robust_list=273 epoll_pwait=281 eventfd2=290 epoll_create1=291
    dup3=292 pipe2=293 preadv=295 pwritev=296 prlimit64=302 getrandom=318 copy_file_range=326
    preadv2=327 pwritev2=328 statx=332 rseq=334 faccessat2=439 close_range=436 epoll_pwait2=441
    prctl=157 clone3=435 openat2=437 renameat=264 stat=4 lstat=6 access=21 pipe=22 select=23
    dup2=33 pause=34 alarm=37 getrlimit=97 rename=82 mkdir=83 rmdir=84 unlink=87 symlink=88
    getpgrp=111 arch_prctl=158 time=201 epoll_wait=232 getxattr=191 lgetxattr=192 fgetxattr=193
    listxattr=194 llistxattr=195 flistxattr=196 chmod=90 fchmod=91 fchmodat=268
    utimensat=280 readlink=89 readlinkat=267
    """
)

AARCH64 = _table(
    """
    read=63 write=64 close=57 fstat=80 lseek=62 mmap=222 mprotect=226 munmap=215 brk=214
    rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139 ioctl=29 pread64=67 pwrite64=68
    readv=65 writev=66 sched_yield=124 mremap=216 msync=227 madvise=233 dup=23 nanosleep=101
    getitimer=102 setitimer=103 getpid=172 sendfile=71 sendto=206 recvfrom=207 shutdown=210
    socketpair=199 clone=220 exit=93 kill=129 uname=160 fcntl=25 flock=32 fsync=82 fdatasync=83
    ftruncate=46 getcwd=17 chdir=49 fchdir=50 umask=166 gettimeofday=169 getrusage=165
    sysinfo=179 times=153 getuid=174 getgid=176 geteuid=175 getegid=177 getppid=173
    getgroups=158 getresuid=148 getresgid=150 getpgid=155 getsid=156 rt_sigpending=136
    rt_sigtimedwait=137 rt_sigsuspend=133 sigaltstack=132 gettid=178 futex=98
    sched_getaffinity=123 getdents64=61 set_tid_address=96 restart_syscall=128 clock_gettime=113
    clock_getres=114 clock_nanosleep=115 exit_group=94 epoll_ctl=21 tgkill=131 openat=56
    mkdirat=34 newfstatat=79 unlinkat=35 renameat2=276 symlinkat=36 faccessat=48
    pselect6=72 ppoll=73 set_robust_list=99 epoll_pwait=22 eventfd2=19 epoll_create1=20 dup3=24
    pipe2=59 preadv=69 pwritev=70 prlimit64=261 getrandom=278 copy_file_range=285 preadv2=286
    pwritev2=287 statx=291 rseq=293 faccessat2=439 close_range=436 epoll_pwait2=441 prctl=167
    clone3=435 openat2=437 renameat=38 getxattr=8 lgetxattr=9 fgetxattr=10 listxattr=11
    llistxattr=12 flistxattr=13 fchmod=52 fchmodat=53 utimensat=88 readlinkat=78
    """
)
