"""Take rights away from this process: namespaces, mounts, capabilities, system calls, resources. Linux.

Everything here goes through libc, since Python 3.11 wraps none of it. Nothing can be undone by the process that called.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)

NEWNS, NEWUTS, NEWIPC = 0x00020000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR = 442
NOBODY = 65534

# x86_64 numbers of what tested code may not ask for: new processes and programs, other processes, sockets, namespaces,
# mounts, and kernel interfaces that no test of a function needs. Threads and all file operations are left.
_FORBIDDEN = {
    **{"fork": 57, "vfork": 58, "execve": 59, "execveat": 322},
    **{"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_getfd": 438, "kcmp": 312},
    **{"socket": 41, "unshare": 272, "setns": 308},
    **{"mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "open_tree": 428, "move_mount": 429},
    **{"fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442},
    **{"add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323},
    **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    **{"init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320},
    **{"open_by_handle_at": 304, "personality": 135, "quotactl": 179, "swapon": 167, "reboot": 169, "acct": 163},
    **{"modify_ldt": 154, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240},
}
_CLONE, _CLONE3, _CLONE_THREAD = 56, 435, 0x00010000


def unshare(flags: int) -> None:
    """Enter new namespaces. With a new user namespace this user becomes `NOBODY` in it and nobody else exists."""
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(flags), "unshare")
    if flags & NEWUSER:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        _write("/proc/self/gid_map", f"{NOBODY} {gid} 1")


def private_mounts() -> None:
    """No mount made from here on is seen outside."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)


def empty_folder(path: str, *, mebibytes: int = 0) -> None:
    """Mount an empty memory file system over `path`: of this size, or read-only."""
    flags = _MS_NOSUID | _MS_NODEV | (_MS_NOEXEC if mebibytes else _MS_RDONLY)
    _mount("tmpfs", path, "tmpfs", flags, f"size={mebibytes}m,nr_inodes=4096,mode=0700" if mebibytes else "mode=0555")


def enter_root(root: str, read_only: Sequence[str], scratch: str) -> None:
    """Make `root`, an empty folder, the root of a file system with `read_only`, an empty `scratch`, and no more."""
    private_mounts()
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755")
    for path in read_only:
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
            continue
        if not os.path.exists(path):
            continue
        if os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            open(root + path, "w").close()
        _mount(path, root + path, None, _MS_BIND | _MS_REC)
        _read_only(root + path, recursive=True)
    for path in ("/proc", scratch, "/.outside"):
        os.makedirs(root + path, exist_ok=True)
    try:
        _mount("proc", f"{root}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    except OSError:  # the one we see has parts covered, so the kernel gives no fresh one
        _mount("/proc", f"{root}/proc", None, _MS_BIND | _MS_REC)
    number = _SYS_PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(f"pivot_root is not known on {platform.machine()}")
    _check(_libc.syscall(number, root.encode(), f"{root}/.outside".encode()), "pivot_root")
    os.chdir("/")
    _check(_libc.umount2(b"/.outside", 2), "umount")
    os.rmdir("/.outside")
    empty_folder(scratch, mebibytes=64)
    _read_only("/", recursive=False)  # /proc has to stay as it is: the maps of new user namespaces are written there


def _read_only(path: str, *, recursive: bool) -> None:
    """This mount, or it and all below it."""
    attributes = (ctypes.c_uint64 * 4)(_MS_RDONLY, 0, 0, 0)  # struct mount_attr
    where = 0x8000 if recursive else 0
    result = _libc.syscall(_SYS_MOUNT_SETATTR, -100, path.encode(), where, attributes, ctypes.sizeof(attributes))
    _check(result, f"mount_setattr {path}")


def limit(*, cpu_seconds: int, memory_mib: int, file_mib: int) -> None:
    """Resource limits of this process and all it starts."""
    for name, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_mib << 20),
        (resource.RLIMIT_FSIZE, file_mib << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(name, (value, value))


def drop_capabilities() -> None:
    """Give up all of them, for good."""
    _check(_libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    for capability in range(64):
        if _libc.prctl(24, capability, 0, 0, 0) != 0:  # beyond the last one, or not ours to drop
            break
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def filters_system_calls() -> bool:
    """Whether `forbid_system_calls` knows this processor."""
    return platform.machine() == "x86_64"


def forbid_system_calls() -> None:
    """Let the kernel refuse `_FORBIDDEN` and new processes with EPERM. x86_64; elsewhere nothing happens."""
    if not filters_system_calls():
        return
    allow, refuse, missing, kill = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38, 0x80000000
    load, equal, at_least, has_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [
        (load, 0, 0, 4),  # architecture
        (equal, 1, 0, 0xC000003E),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # number
        (at_least, 0, 1, 0x40000000),  # the x32 names of the same calls
        (give, 0, 0, kill),
        (equal, 0, 1, _CLONE3),  # its flags lie in memory, where a filter cannot look; libc then takes clone
        (give, 0, 0, missing),
        (equal, 0, 4, _CLONE),
        (load, 0, 0, 16),  # first argument
        (has_bits, 0, 1, _CLONE_THREAD),
        (give, 0, 0, allow),
        (give, 0, 0, refuse),
    ]
    for number in _FORBIDDEN.values():
        program += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    program.append((give, 0, 0, allow))
    filters = (_Filter * len(program))(*program)
    packed = _Program(len(program), filters)
    _check(_libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    _check(_libc.prctl(22, 2, ctypes.byref(packed), 0, 0), "seccomp")


class _Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("filters", ctypes.POINTER(_Filter))]


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    result = _libc.mount(
        source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), options and options.encode()
    )
    _check(result, f"mount {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
