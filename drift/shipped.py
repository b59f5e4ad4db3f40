"""The configs and examples that come with the package: `drift run quickstart` reads one, `drift init` copies all."""

from __future__ import annotations

import shutil
from pathlib import Path

PACKAGE = Path(__file__).parent
FOLDERS = {"configs": ".yaml", "examples": ".py"}


def folder(name: str) -> Path:
    """Of an installed package inside it; of a clone, beside it."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def configs() -> dict[str, Path]:
    """Shipped configs by name, such as "quickstart" and "papers/a-qwen2.5-3b"."""
    inside = folder("configs")
    return {path.relative_to(inside).as_posix().removesuffix(".yaml"): path for path in sorted(inside.rglob("*.yaml"))}


def copy_to(target: Path) -> list[Path]:
    """Copies configs/ and examples/ into `target`. Raises FileExistsError, before anything is written, if a file is there."""
    copies = {
        path: target / name / path.relative_to(folder(name))
        for name, suffix in FOLDERS.items()
        for path in sorted(folder(name).rglob(f"*{suffix}"))
    }
    if present := [str(copy) for copy in copies.values() if copy.exists()]:
        raise FileExistsError(f"{present[0]} exists, and is not overwritten; name another folder, or remove it")
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return list(copies.values())
