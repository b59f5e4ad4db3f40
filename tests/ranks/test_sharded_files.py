"""`drift train` with train.shard=fsdp: weights go from files into shards and back into files, and no rank holds the whole."""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
import torchrun
from safetensors.torch import load_file
from test_offline_ranks import close
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM

from drift.config import ModelConfig, load
from drift.jobs import stages
from drift.model import hollow, tiny
from drift.model.policy import load_policy
from drift.training import distributed, saving, sharding, trainer

LAYERS, WIDTH = 8, 64
MODELS = {  # name → (tied, dtype, further settings)
    "tied": (True, "float32", []),
    "untied": (False, "float32", []),
    "bfloat16": (True, "bfloat16", ["model.gradient_checkpointing=true"]),
    "lora": (False, "float32", ["model.lora={rank: 4, alpha: 8}", "model.gradient_checkpointing=true"]),
}


def settings(folder, name, shard):
    changes = [f"model.path={folder / name}", f"model.dtype={MODELS[name][1]}", f"train.shard={shard}", "train.lr=1e-3"]
    changes += [
        "train.batch_size=4",
        "train.epochs=2.0",
        "train.max_tokens=64",
        "train.max_length=64",
        "train.tree=off",
    ]
    changes += ["rollout.max_new_tokens=8", *MODELS[name][2]]
    return load(torchrun.ROOT / "configs" / "quickstart.yaml", changes)


def prepare(folder):
    """The models, in files, and rollouts that do not say who sampled them."""
    tokenizer = tiny.build_tokenizer()
    for name, (tied, dtype, _) in MODELS.items():
        torch.manual_seed(1)
        shape = {"hidden_size": WIDTH, "intermediate_size": 160, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
        model = Qwen2ForCausalLM(Qwen2Config(**shape, initializer_range=0.1)).to(getattr(torch, dtype))
        model.save_pretrained(folder / name, max_shard_size="200KB")
        tokenizer.save_pretrained(folder / name)
    rows = []
    for number in range(9):
        said = [
            {"role": "user", "content": f"Say {number}"},
            {"role": "assistant", "content": f"the answer is {number**3}"},
        ]
        rows.append({"prompt_id": f"p{number // 3}", "messages": said, "reward": float(number % 2)})
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Weighed:
    """Inside, counts the bytes of tensors that this rank holds, whoever refers to them."""

    def __enter__(self):
        self.spreading = self.training = 0
        self.before = living()
        self.step, self.spread = trainer.train_step, sharding.fully_shard
        trainer.train_step, sharding.fully_shard = self.steps, self.spreads
        return self

    def __exit__(self, *_):
        trainer.train_step, sharding.fully_shard = self.step, self.spread

    def steps(self, policy, *args, **options):
        self.training = max(self.training, sharding.local_bytes(policy.model.parameters()))
        return self.step(policy, *args, **options)

    def spreads(self, unit, **options):
        self.spreading = max(self.spreading, living() - self.before)
        return self.spread(unit, **options)


def living():
    """Bytes of the storages of all tensors, each once."""
    gc.collect()
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}.values()
    )


def main(folder):
    torch.set_num_threads(1)
    with distributed.launched() as rank:
        for name in MODELS:
            with Weighed() as weighed:
                made = settings(folder, name, "fsdp")
                stages.fit(made, folder / "rollouts.jsonl", folder / f"{name}-fsdp", seed=2)
            held = {"spreading": weighed.spreading, "training": weighed.training}
            (folder / f"{name}-{rank}.json").write_text(json.dumps(held))
        policy = load_policy(ModelConfig(path=str(folder / "untied")), empty=True)
        assert sum(p.numel() for p in policy.model.parameters()) == 0
        with sharding.sharded(policy, "fsdp") as spread:
            assert spread.hash() == load_policy(ModelConfig(path=str(folder / "untied"))).hash()
            saving.save(spread, folder / "parts", most=100_000)


@pytest.fixture(scope="module", params=[2, 4])
def out(request, tmp_path_factory):
    """(number of ranks, folder): each model in NAME, trained by one rank in NAME-none, and by several in NAME-fsdp."""
    folder = tmp_path_factory.mktemp("files")
    prepare(folder)
    torchrun.run(request.param, __file__, folder)
    for name in MODELS:
        stages.fit(settings(folder, name, "none"), folder / "rollouts.jsonl", folder / f"{name}-none", seed=2)
    return request.param, folder


def weights(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_files_are_those_of_one_rank(name, out):
    _, folder = out
    ours, theirs = (weights(folder / f"{name}-{shard}") for shard in ("fsdp", "none"))
    start = weights(folder / name)
    moved = max(float((theirs[k].float() - start[k].float()).abs().max()) if k in start else 1.0 for k in theirs)
    assert moved > 1e-3
    close(ours, theirs, 1e-2 if name == "bfloat16" else 1e-5)
    assert {t.dtype for t in ours.values()} == {t.dtype for t in theirs.values()}
    for file in ("config.json", "tokenizer.json", "manifest.json"):
        assert (folder / f"{name}-fsdp" / file).exists() == (folder / f"{name}-none" / file).exists()
    if name != "lora":
        AutoModelForCausalLM.from_pretrained(folder / f"{name}-fsdp")
        kinds = [json.loads((folder / f"{name}-{s}" / "config.json").read_text()) for s in ("fsdp", "none")]
        assert kinds[0] == kinds[1]


def test_no_rank_holds_the_whole(out):
    ranks, folder = out
    for rank in range(ranks):
        for name in ("tied", "untied", "bfloat16"):
            held = json.loads((folder / f"{name}-{rank}.json").read_text())
            shapes = weights(folder / name)
            total = sum(t.numel() for t in shapes.values()) * 4
            layer = sum(t.numel() for key, t in shapes.items() if ".layers.0." in key) * 4
            unit = max(layer, total - LAYERS * layer)  # a layer, or what lies outside
            assert held["training"] <= total / ranks * 1.1
            assert held["spreading"] <= total / ranks * 1.1 + unit
            assert held["spreading"] < total


def test_files_of_a_large_model_have_an_index(out):
    _, folder = out
    whole = load_policy(ModelConfig(path=str(folder / "untied"))).hash()
    assert len(list((folder / "parts").glob("model-*.safetensors"))) > 3
    assert load_policy(ModelConfig(path=str(folder / "parts"))).hash() == whole


def test_what_cannot_be_read_as_shards_is_refused(tmp_path):
    prepare(tmp_path)
    index = tmp_path / "tied" / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"] = {name.replace("mlp", "ffn"): file for name, file in found["weight_map"].items()}
    index.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"its files lack 24 of them, such as .*mlp.*; set train.shard=none"):
        load_policy(ModelConfig(path=str(tmp_path / "tied")), empty=True)
    file = next((tmp_path / "untied").glob("model-*1-of-*"))
    name, tensor = next(iter(load_file(file).items()))
    from safetensors.torch import save_file

    save_file(load_file(file) | {name: tensor.fill_(float("nan"))}, file)
    with pytest.raises(ValueError, match=rf"values of {name} are NaN"):
        hollow.Weights(tmp_path / "untied").read(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
