"""Run by test_verl_engine.py, alone or under `torchrun`: verl's own FSDP engine on a CPU, three steps of its PPO loss.

verl has no CPU among its platforms, but a registry for others: `OnCpu` is one, and VERL_PLATFORM=cpu chooses it. Nothing
of verl is replaced but by the adapter: the engine's forward, its loss, FSDP, clipping and AdamW are verl's.
"""

# ruff: noqa: E402  (verl reads the environment when it is imported)
from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from pathlib import Path

os.environ |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "HF_HUB_OFFLINE": "1"}

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

warnings.simplefilter("ignore")
sys.modules["trl"] = None  # where there is a TRL, verl 0.9.1 imports a value head of it that TRL 1.16 no longer has

from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


@PlatformRegistry.register("cpu")
class OnCpu(PlatformBase):
    """verl's abstraction of an accelerator, of none."""

    device_name, vendor_name, device_module = "cpu", "cpu", torch.cpu

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def communication_backend_name(self):
        return "gloo"

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def nothing(self, *_):
        return None

    set_device = synchronize = set_allocator_settings = empty_cache = nothing
    profiler_start = profiler_stop = cudart = ray_resource_name = visible_devices_envvar = nothing

    def get_device_capability(self, device_index=0):
        return None, None

    def nvtx_range(self, msg):
        return contextlib.nullcontext()

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False


from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry
from verl.workers.utils.losses import ppo_loss


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of unequal length, as verl's engines take them."""
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch(mine: slice, old: list[torch.Tensor] | None, **settings) -> TensorDict:
    """This rank's share of eight conversations; `old` are log-probs of its whole rows, which become the sampler's with noise."""
    g = torch.Generator().manual_seed(4)
    rows: dict[str, list[torch.Tensor]] = {}
    for i in range(8):
        prompt, answer = (int(torch.randint(2, n, (), generator=g)) for n in (6, 9))
        ids = torch.randint(3, 64, (prompt + answer,), generator=g)
        mask = torch.ones(answer, dtype=torch.int64)
        mask[answer // 2 : answer // 2 + i % 2] = 0  # a tool's token in between
        row = {
            "input_ids": ids,
            "position_ids": torch.arange(len(ids)),
            "prompts": ids[:prompt],
            "responses": ids[prompt:],
            "response_mask": mask,
            "loss_mask": torch.cat([torch.zeros(prompt, dtype=torch.int64), mask]),
            "advantages": torch.randn((), generator=g).expand(answer).clone(),
            "old_log_probs": 0.3 * torch.randn(answer, generator=g),
        }
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    rows = {name: values[mine] for name, values in rows.items()}
    if old is not None:
        for i, (whole, prompt) in enumerate(zip(old, rows["prompts"])):
            rows["old_log_probs"][i] += whole[len(prompt) - 1 : -1]  # place i holds the log-prob of token i + 1
    data = TensorDict({name: nested(values) for name, values in rows.items()}, batch_size=[len(rows["prompts"])])
    tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=2, temperature=0.7, pad_token_id=0)
    tu.assign_non_tensor(data, global_batch_size=8, calculate_entropy=True, **settings)
    return data


def engine(folder: Path, strategy: str, implementation: str | None, drift: bool, packed: bool, lora: bool):
    """verl's engine over the model in `folder`; without an implementation of fused heads, over logits."""
    torch.manual_seed(0)  # LoRA's A
    model = HFModelConfig(
        path=str(folder),
        override_config={"attn_implementation": "sdpa"},
        use_remove_padding=packed,
        use_fused_kernels=implementation is not None,
        fused_kernel_options={"impl_backend": implementation},
        external_lib="drift_kernels.adapters.verl.on" if drift else None,  # the one line
        lora_rank=4 if lora else 0,
        target_modules=["q_proj", "v_proj"],
    )
    whole = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    settings = FSDPEngineConfig(strategy=strategy, mixed_precision=whole, use_torch_compile=False, use_orig_params=lora)
    # some gradients are zero but for rounding, which Adam would blow up
    optimizer = FSDPOptimizerConfig(lr=1e-2, total_training_steps=10, override_optimizer_config={"eps": 1e-4})
    made = EngineRegistry.new("language_model", strategy, model, settings, optimizer, CheckpointConfig())
    made.initialize()
    return made


WAYS = {  # in this order: external_lib is not undone
    "logits": (None, False),
    "verl": ("torch", False),
    "drift, torch": ("torch", True),
    "drift, triton": ("triton", True),
}


def run(folder: Path, strategy: str, way: str, packed: bool, lora: bool, old: list[torch.Tensor] | None) -> dict:
    """What the engine makes of three steps; log-probs and entropies before the first."""
    implementation, drift = WAYS[way]
    made = engine(folder, strategy, implementation, drift, packed, lora)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    settings = {"use_fused_kernels": implementation is not None, "use_remove_padding": packed}
    with made.eval_mode():
        out = made.infer_batch(batch(mine, None, **settings))["model_output"]
    found: dict = {name: [row.clone() for row in out[name].unbind()] for name in ("log_probs", "entropy")}
    config = ActorConfig(
        strategy=strategy, rollout_n=1, ppo_micro_batch_size_per_gpu=2, entropy_coeff=0.01, clip_ratio_high=0.28
    )
    found |= {"losses": [], "norms": [], "metrics": []}
    old = found["log_probs"] if old is None else old
    with made.train_mode():
        for _ in range(3):
            out = made.train_batch(batch(mine, old, **settings), functools.partial(ppo_loss, config=config))
            found["losses"].append(float(sum(out["loss"])))
            found["norms"].append(float(out["metrics"]["grad_norm"]))
            found["metrics"] = sorted(out["metrics"])
            found["clipped"] = float(out["metrics"]["actor/pg_clipfrac"].aggregate())
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in made.module.named_parameters()}
    found["weights"] = {name: p.detach().clone() for name, p in whole.items()}
    return found


def main(strategy: str, packed: str, lora: str, folder: str) -> None:
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict = {}
    for way, (implementation, _) in WAYS.items():
        if packed == "padded" and implementation == "triton":
            continue  # verl's kernel, and so ours, flattens what its engine then takes for [B, L]
        old = found["logits"]["log_probs"] if found else None
        try:
            found[way] = run(Path(folder) / "model", strategy, way, packed == "packed", lora == "lora", old)
        except RuntimeError as error:
            if way != "verl":
                raise
            found[way] = str(error)  # its fused heads do not know a head that is sharded by itself
    torch.save(found, Path(folder) / f"rank{dist.get_rank()}.pt")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
