"""The .cu kernels as a shared library for the CPU: their own text, on the headers of `simt/` instead of CUDA's.

`__shared__` declarations are the one thing that the headers cannot express, so they are rewritten; nothing else is.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path

import torch

from drift_kernels.backends import cuda, cuda_library

ROOT = Path(__file__).parents[2]
SIMT = Path(__file__).parent / "simt"
ORDERS = (0, 1, 2, 3)  # warps and blocks forwards or backwards, lanes forwards or backwards
FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
SANITIZE = ["-g", "-fsanitize=address,alignment", "-fno-sanitize-recover=all"]
LIBRARY = "SIMT_LIBRARY"  # environment: the library that the value tests take, instead of one of their own
STREAM = 0x5EA  # what launches are given as torch's current stream
H100_SHARED = 232_448  # bytes a block may have
_objects: dict[tuple, Path] = {}


def translate(text: str, counter) -> str:
    """CUDA text with each __shared__ variable as a reference into its block's memory."""
    text = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1* const \2 = simt::dynamic_shared<\1>();", text)

    def static(match: re.Match) -> str:
        kind, name, extent = match.groups()
        return f"auto& {name} = simt::static_shared<{kind}{extent}>({next(counter)});"

    return re.sub(r"__shared__ (\w+) (\w+)((?:\[\w+\])*);", static, text)


def build(
    folder: Path,
    *,
    sanitize: bool = False,
    changes: tuple[tuple[str, str, str], ...] = (),
    within: str | None = None,
    level: str = "-O1",
    options: tuple[str, ...] = (),
) -> Path:
    """Compiles csrc/cuda in `folder`, and returns the library.

    `changes` are (file below csrc, text, its replacement), each found exactly once. `within` is the one .cu file that they are
    made for; the others are compiled as they are. What was compiled before is taken from there. `options` go to the compiler.
    """
    sources = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".h", ".cu")]
    texts = {str(p.relative_to(ROOT / "csrc")): p.read_text() for p in sources if p.parent.name in ("csrc", "cuda")}
    changed = dict(texts)
    for name, old, new in changes:
        assert changed[name].count(old) == 1, f"{name} has {changed[name].count(old)} times: {old}"
        changed[name] = changed[name].replace(old, new)
    for subfolder, written in (("plain", texts), ("changed", changed)):
        counter = itertools.count(1)
        for name, text in written.items():
            (folder / subfolder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / subfolder / name).write_text(translate(text, counter))
    flags = (*FLAGS, level, *(SANITIZE if sanitize else ()), *options)
    units = sorted((name for name in texts if name.endswith(".cu")), key=lambda name: name != within)
    # changed ones first: of a header's functions the linker takes the first that it finds
    objects = [_object(folder / ("changed" if within in (None, name) else "plain") / name, flags) for name in units]
    library = folder / "emulated.so"
    _compile([*flags, "-shared", *map(str, objects), "-o", str(library)])
    return library


def _object(source: Path, flags: tuple[str, ...]) -> Path:
    """A .cu file's object, or that of an earlier build from the same text of it and of all that it includes."""
    command = [*flags, f"-I{SIMT}", "-x", "c++", "-c", str(source)]
    rule = _compile([*command, "-MM"]).replace("\\\n", " ")
    key = (source.name, flags, tuple(Path(path).read_text() for path in rule.split(": ", 1)[1].split()))
    if key not in _objects:
        _compile([*command, "-o", str(source.with_suffix(".o"))])
        _objects[key] = source.with_suffix(".o")
    return _objects[key]


def _compile(arguments: list[str]) -> str:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build_as_asked(folder: Path) -> Path:
    """As they are, or the library that the environment names."""
    asked = os.environ.get(LIBRARY)
    return Path(asked) if asked else build(folder)


@contextmanager
def running(library: Path, monkeypatch):
    """`drift_kernels.backends.cuda` on CPU tensors, through the emulated library; yields set(order, shared, clusters)."""
    call, settings = cuda_library.bind(library), ctypes.CDLL(str(library)).simt_set
    limits = {"shared": H100_SHARED, "clusters": True}

    def choose(order: int = 0, shared: int = H100_SHARED, clusters: bool = True) -> None:
        limits.update(shared=shared, clusters=clusters)
        settings(order, shared, int(clusters))

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "library", lambda: call)
        patch.setattr(cuda, "_limits", lambda device: (limits["shared"], limits["clusters"]))
        # a GPU without clusters is another device, since a kernel's attributes are read once for each device
        patch.setattr(cuda, "_device_and_stream", lambda device: (0 if limits["clusters"] else 1, STREAM))
        choose()
        yield choose


def launches(monkeypatch, **fixed):
    """Makes every launch `fixed` threads, cluster, on_chip; what is left out follows the rule."""
    rule = cuda.choose.__wrapped__
    monkeypatch.setattr(cuda, "choose", lambda *a: cuda.Launch(**{**vars(rule(*a)), **fixed}))


def padded(rows: int, columns: int, dtype: torch.dtype, lead: int, gap: int) -> torch.Tensor:
    """NaN-filled [rows, columns] whose first row starts `lead` elements past a 16-byte boundary, `gap` between rows."""
    stride = columns + gap
    storage = torch.full((lead + rows * stride + 16,), float("nan"), dtype=dtype)
    assert storage.data_ptr() % 16 == 0
    return storage[lead : lead + rows * stride].view(rows, stride)[:, :columns]
