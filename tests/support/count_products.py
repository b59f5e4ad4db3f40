"""How much work a call does, told by its products: rows through each of them, and blocks that are as large as a weight."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import drift_kernels as dk
from drift_kernels import distill_driver, driver, products


def watch_products(monkeypatch):
    """Rows that each product saw since the last `clear()`, {product: rows}; "teacher" counts logits of a second head alone."""
    seen = dict.fromkeys(("logits", "teacher", "dhidden", "dweight"), 0)

    def watch(owner, method, moves):
        original = getattr(owner, method)

        def counted(self, first, *rest, **options):
            for name, by in moves.items():
                seen[name] += by * first.shape[0]
            return original(self, first, *rest, **options)

        monkeypatch.setattr(owner, method, counted)

    for kind in (products.Native, products.Widened):
        for method in ("logits", "dhidden", "dweight"):
            watch(kind, method, {method: 1})
    watch(products.CpuBlock, "products", {"teacher": 1, "logits": -1})
    return seen


def clear(seen):
    seen.update(dict.fromkeys(seen, 0))


def room_for(rows, hidden, weight):
    """A workspace for chunks of that many hidden rows, gradients and all."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    by, (V, D) = products.choose(hidden, weight, dtype, 1 << 30), weight.shape
    row = (products.row_stride(V, dtype) + D) * dtype.itemsize + by.row_bytes
    return dk.KernelConfig(workspace_bytes=by.bytes + row * rows)


class Blocks(TorchDispatchMode):
    """Operators that make floats of at least `elements`, other than views of `given`, in `found`.

    Around a registered op a mode sees its results alone; `monkeypatch` lets this one look into what they call.
    """

    def __init__(self, monkeypatch, elements, *given):
        super().__init__()
        self.elements, self.found = elements, []
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        for module, names in ((driver, ("fused", "pointwise", "score", "backward")), (distill_driver, ("fused",))):
            for name in names:
                monkeypatch.setattr(module, name, self._within(getattr(module, name)))

    def _within(self, function):
        def watched(*args):
            with self:
                return function(*args)

        return watched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            large = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() >= self.elements
            if large and tensor.untyped_storage().data_ptr() not in self.given:
                self.found.append(f"{func} makes {list(tensor.shape)}")
        return out
