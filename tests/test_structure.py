"""The import order of both packages, read off their syntax trees, and what importing them must not do."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import drift_kernels as dk
from drift.config.schema import TrainConfig
from drift_kernels.backends import REASONS
from drift_kernels.calls import BACKENDS, KERNEL_BACKENDS

ROOT = Path(__file__).parent.parent
KERNELS = [
    "native",
    "checks",
    "spec",
    "distill_spec",
    "calls",
    "formulas",
    "divergences",
    "exploration",
    "tensors",
    "plan",
]
KERNELS += ["outputs", "parallel", "collectives", "head", "backends", "inputs", "folding", "closures", "teachers"]
KERNELS += ["memory", "products", "token_terms", "pieces", "cpu_sweep", "shares", "gpu_sweep", "sweeps"]
KERNELS += ["driver", "distill_driver", "gathered"]
KERNELS += ["registered", "scored", "needs", "reference", "autograd", "alignment", "uncompiled", "ops", "distill_ops"]
KERNELS += ["testing", "conversation", "packs"]
KERNELS += ["adapters"]
TRAINER = [  # lowest first; wings of one level never import each other
    {"files", "interrupts", "shipped", "threads"},
    {"config", "types", "track", "scoring"},
    {"returns", "routing", "rhythm", "buffer", "store", "packing", "tasks"},
    {"model", "data"},
    {"engines", "training"},
    {"rollouts"},
    {"online"},
    {"report"},
    {"jobs"},
    {"cli"},
    {"__main__"},
]


def imports(path: Path, package: str):
    """(imported module inside `package`, names) of every import statement in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names if alias.name.split(".")[0] == package)


def rooms(module: str, names: list[str], order: list[str]) -> set[str]:
    parts = module.split(".")
    return {parts[1]} if len(parts) > 1 else {name for name in names if name in order}


@pytest.mark.parametrize("path", sorted((ROOT / "drift_kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_import_downward(path):
    room = path.relative_to(ROOT / "drift_kernels").parts[0].removesuffix(".py")
    assert not list(imports(path, "drift")), "drift_kernels must not import drift"
    if room == "__init__":
        return
    for module, names in imports(path, "drift_kernels"):
        for other in rooms(module, names, KERNELS):
            if other not in ("_cpu", room):
                assert KERNELS.index(other) < KERNELS.index(room), f"{room} imports {other}"


@pytest.mark.parametrize("path", sorted((ROOT / "drift_kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_depend_on_torch_and_numpy_alone(path):
    allowed = {"torch", "numpy", "drift_kernels", *sys.stdlib_module_names}
    if "adapters" in path.parts:
        return
    if "triton" in path.parts:  # imported where it runs
        allowed |= {"triton"}
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        assert all(name.split(".")[0] in allowed for name in names if name), f"{path.name} imports {names}"


def test_adapters_are_leaves_that_share_one_room():
    folder = ROOT / "drift_kernels" / "adapters"
    for path in [*(ROOT / "drift").rglob("*.py"), *(ROOT / "drift_kernels").rglob("*.py")]:
        for module, names in imports(path, "drift_kernels"):
            if not (module + ".").startswith("drift_kernels.adapters."):
                continue
            assert folder in path.parents, f"{path.name} imports {module}"
            leaf = path.relative_to(folder).parts[0].removesuffix(".py")
            others = {module.split(".")[2]} if module.count(".") > 1 else set(names)
            assert others <= {leaf, leaf.removesuffix("_plugin"), "_common"}, f"{leaf} imports {others}"


def test_the_trainer_and_the_adapters_use_public_names_of_the_kernels():
    import drift_kernels

    for path in [*(ROOT / "drift").rglob("*.py"), *(ROOT / "drift_kernels" / "adapters").rglob("*.py")]:
        for module, names in imports(path, "drift_kernels"):
            if "adapters" in path.parts and module.startswith("drift_kernels.adapters"):
                continue
            if module == "drift_kernels.packs":  # public as a module: most users of the ops need none of it
                continue
            if "adapters" in path.parts and module == "drift_kernels.head.models":
                continue  # the reader of heads, inside a model's forward
            assert module == "drift_kernels", f"{path.name} imports {module}"
            assert set(names) <= set(drift_kernels.__all__), f"{path.name} imports {names}"


@pytest.mark.parametrize("path", sorted((ROOT / "drift").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_trainer_imports_downward(path):
    level = {name: i for i, names in enumerate(TRAINER) for name in names}
    room = path.relative_to(ROOT / "drift").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for module, names in imports(path, "drift"):
        for other in rooms(module, names, list(level)):
            if other not in (room, "_packing"):
                assert level[other] < level[room], f"{room} imports {other}"


def test_importing_the_kernels_loads_neither_transformers_nor_triton_and_touches_no_gpu():
    code = "import sys, torch, drift_kernels; bad = {'transformers', 'drift', 'triton'} & set(sys.modules); "
    code += "assert not bad, bad; assert not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_are_rooms_with_one_job():
    files = [
        p
        for folder in ("drift", "drift_kernels", "csrc", "bench")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in {".py", ".cpp", ".h", ".cu"}
    ]
    lengths = sorted((len(p.read_text().splitlines()), str(p.relative_to(ROOT))) for p in files)
    assert lengths[-1][0] <= 500, lengths[-1]
    assert lengths[len(lengths) // 2][0] <= 200, lengths


def test_lines_of_the_kernels_sources_fit():
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".h", ".cu"}]
    lines = ((path, number, line) for path in files for number, line in enumerate(path.read_text().splitlines(), 1))
    long = [f"{path.relative_to(ROOT)}:{number}" for path, number, line in lines if len(line) > 110]
    assert files
    assert not long


def test_ops_have_few_parameters_and_the_documentation_counts_them():
    page, limits = (ROOT / "docs/losses.md").read_text(), {"self_distill_loss": 21}
    ops = [name for name in dk.__all__ if inspect.isfunction(getattr(dk, name)) and "hidden" in parameters_of(name)]
    assert len(ops) >= 7
    for name in (*ops, "policy_token_loss"):
        count = len(parameters_of(name))
        assert count <= limits.get(name, 18), f"{name} has {count} parameters"
        assert re.search(rf"^\| `{name}`[^|]*\| {count} \|", page, re.MULTILINE), f"docs/losses.md: {name} has {count}"


def parameters_of(op):
    return inspect.signature(getattr(dk, op)).parameters


def test_the_trainer_offers_the_backends_of_the_kernels():
    offered = get_args(TrainConfig.model_fields["backend"].annotation)
    assert sorted(offered) == sorted(BACKENDS)
    assert set(REASONS) == set(KERNEL_BACKENDS)
