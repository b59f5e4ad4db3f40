"""Takes a process's rights away: no network, no new process, no file opened for writing, few files to read.

Linux alone, by two kernel features that need no privilege: a seccomp filter that lets through a list of system calls (any
other one fails with EPERM), and Landlock, which leaves a list of folders to read. Limits of memory, file size and open
files are set on every POSIX system. The syscall numbers are those of x86-64 and AArch64; the filter has run on x86-64 alone.

Left out: limits of time. Whoever waits for the process sets them (`drift.scoring.sandbox`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Sequence

_X86_64 = {
    **dict(read=0, write=1, close=3, stat=4, fstat=5, lstat=6, poll=7, lseek=8, mmap=9, mprotect=10, munmap=11, brk=12),
    **dict(rt_sigaction=13, rt_sigprocmask=14, rt_sigreturn=15, ioctl=16, pread64=17, readv=19, writev=20, access=21),
    **dict(select=23, sched_yield=24, mremap=25, madvise=28, dup=32, dup2=33, nanosleep=35, setitimer=38, getpid=39),
    **dict(clone=56, exit=60, uname=63, fcntl=72, getcwd=79, readlink=89, gettimeofday=96, getrlimit=97, getrusage=98),
    **dict(sysinfo=99, times=100, getuid=102, getgid=104, geteuid=107, getegid=108, getppid=110, sigaltstack=131),
    **dict(statfs=137, arch_prctl=158, gettid=186, futex=202, sched_getaffinity=204, getdents64=217),
    **dict(restart_syscall=219, clock_gettime=228, clock_getres=229, clock_nanosleep=230, exit_group=231),
    **dict(epoll_wait=232, epoll_ctl=233, tgkill=234, openat=257, newfstatat=262, readlinkat=267, faccessat=269),
    **dict(pselect6=270, ppoll=271, set_robust_list=273, epoll_create1=291, dup3=292, prlimit64=302, getcpu=309),
    **dict(seccomp=317, getrandom=318, membarrier=324, statx=332, rseq=334, clone3=435, faccessat2=439),
}
_AARCH64 = {
    **dict(getcwd=17, epoll_create1=20, epoll_ctl=21, epoll_pwait=22, dup=23, dup3=24, fcntl=25, ioctl=29, statfs=43),
    **dict(faccessat=48, openat=56, close=57, getdents64=61, lseek=62, read=63, write=64, readv=65, writev=66),
    **dict(pread64=67, pselect6=72, ppoll=73, readlinkat=78, newfstatat=79, fstat=80, exit=93, exit_group=94, futex=98),
    **dict(set_robust_list=99, nanosleep=101, setitimer=103, clock_gettime=113, clock_getres=114, clock_nanosleep=115),
    **dict(sched_getaffinity=123, sched_yield=124, restart_syscall=128, tgkill=131, sigaltstack=132, rt_sigaction=134),
    **dict(rt_sigprocmask=135, rt_sigreturn=139, times=153, uname=160, getrlimit=163, getrusage=165, getcpu=168),
    **dict(gettimeofday=169, getpid=172, getppid=173, getuid=174, geteuid=175, getgid=176, getegid=177, gettid=178),
    **dict(sysinfo=179, brk=214, munmap=215, mremap=216, clone=220, mmap=222, mprotect=226, madvise=233, prlimit64=261),
    **dict(seccomp=277, getrandom=278, membarrier=283, statx=291, rseq=293, clone3=435, faccessat2=439),
}
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}  # the audit architecture, the numbers

_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_EPERM, _ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # instructions of the filter
_WRITING = 0o3 | 0o100 | 0o1000 | 0o20000000  # O_WRONLY, O_RDWR; O_CREAT; O_TRUNC; O_TMPFILE
_THREAD = 0x10000  # CLONE_THREAD
_TERMINAL = (0x5401, 0x5413, 0x5451)  # ioctl: TCGETS, TIOCGWINSZ, FIOCLEX
_NO_NEW_PRIVILEGES, _DUMPABLE = 38, 4  # prctl
_READ = 1 << 2 | 1 << 3  # Landlock: read a file, list a folder


def confine(readable: Sequence[str], memory: int) -> bool:
    """Confines this process for good; whether a write, a socket and a new process are refused afterwards.

    readable: folders that stay readable. memory: bytes of address space. Call it before threads are started.
    """
    _limit(memory)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_DUMPABLE, 0, 0, 0, 0)
        if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0:
            _landlock(libc, readable)
            _seccomp(libc)
    return confined()


def confined() -> bool:
    """Whether this process is refused a file to write, a socket, and a child: each is tried."""
    import socket

    for path in ("/tmp", os.getcwd()):
        try:
            os.close(
                os.open(os.path.join(path, f".confined-{os.getpid()}"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            )
        except OSError:
            continue
        os.unlink(os.path.join(path, f".confined-{os.getpid()}"))
        return False
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
        return False
    except OSError:
        pass
    try:
        child = os.fork()
    except OSError:
        return True
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return False


def _limit(memory: int) -> None:
    import resource

    limits = {"RLIMIT_AS": memory, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64}
    for name, most in limits.items():
        if sys.platform == "darwin" and name == "RLIMIT_AS":  # macOS refuses it
            continue
        hard = resource.getrlimit(getattr(resource, name))[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(getattr(resource, name), (most, most))


def _landlock(libc: ctypes.CDLL, readable: Sequence[str]) -> bool:
    """Leaves the folders to read, and no other right on files; False when the kernel has no Landlock."""
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return False
    files = (1 << (13 + (version >= 2) + (version >= 3))) - 1 | (1 << 15 if version >= 5 else 0)
    attributes = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = libc.syscall(444, attributes, 8 if version < 4 else 16 if version < 6 else 24, 0)
    if rules < 0:
        return False
    for folder in readable:
        try:
            place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = _READ if os.path.isdir(folder) else 1 << 2
        libc.syscall(445, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    done = libc.syscall(446, rules, 0) == 0
    os.close(rules)
    return done


def _seccomp(libc: ctypes.CDLL) -> bool:
    """Installs the filter in all threads; False when the machine or the kernel has none."""
    if platform.machine() not in _MACHINES or struct.calcsize("P") != 8:
        return False
    program = b"".join(struct.pack("HBBI", *line) for line in _filter(*_MACHINES[platform.machine()], os.getpid()))
    held = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(held))
    return libc.syscall(_MACHINES[platform.machine()][1]["seccomp"], 1, 1, header) == 0


def _filter(machine: int, numbers: dict[str, int], process: int) -> list[tuple[int, int, int, int]]:
    """The filter's instructions: (code, jump if true, jump if false, operand)."""

    def argument(index: int) -> tuple[int, int, int, int]:
        return _LOAD, 0, 0, 16 + 8 * index  # its lower half, on a little-endian machine

    checked: dict[str, list[tuple[int, int, int, int]]] = {
        "openat": [argument(2), (_ANY_BIT, 0, 1, _WRITING), (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)],
        "clone": [argument(0), (_ANY_BIT, 1, 0, _THREAD), (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)],
        "clone3": [(_RETURN, 0, 0, _ENOSYS)],  # its flags lie in memory; the C library falls back to clone
        "tgkill": [argument(0), (_EQUAL, 1, 0, process), (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)],
        "prlimit64": [argument(0), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)],
        "ioctl": [
            argument(1),
            *((_EQUAL, len(_TERMINAL) - i, 0, code) for i, code in enumerate(_TERMINAL)),
            (_RETURN, 0, 0, _EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ],
    }
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, machine), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for name, number in numbers.items():
        if name == "seccomp":
            continue
        body = checked.get(name, [(_RETURN, 0, 0, _ALLOW)])
        program += [(_EQUAL, 0, len(body), number), *body]
    return [*program, (_RETURN, 0, 0, _EPERM)]
