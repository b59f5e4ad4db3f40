"""`bench.scale` in one process: published sizes, measured states, what autograd saves, the papers' configs, its tables."""

from pathlib import Path

import pytest
import torch
from tiny_policy import LORA, SHAPE, Policy
from transformers.models.qwen2 import Qwen2Config
from weighed import JOBS, computed, held, measured

from bench import scale
from bench.shapes import PUBLISHED, shapes_of
from drift.config import LoRAConfig, ModelConfig, load
from drift.packing import pack
from drift.types import Trajectory, Turn

ROOT = Path(__file__).parents[2]
COUNTS = {  # as the models' cards or the hub's safetensors metadata give them
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-8B": 8_190_735_360,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen2.5-72B": 72_706_203_648,
}


def test_published_models_have_their_published_numbers_of_parameters():
    assert list(COUNTS) == list(PUBLISHED)
    for name, count in COUNTS.items():
        assert shapes_of(ModelConfig(path=f"owner/{name}-Instruct", dtype="bfloat16")).count() == count, name


@pytest.mark.parametrize("name", JOBS)
def test_states_of_one_rank_are_the_formulas_to_the_byte(name, tmp_path):
    found, expected = measured(name, 2, "none"), computed(tmp_path, name, 1, 2, "none")
    for state in ("weights", "masters", "gradients", "moments"):
        assert found[state] == expected.states.get(state, 0), state
    assert expected.received == {}


def test_adapters_of_the_embedded_model_are_counted():
    policy = Policy(Qwen2Config(**SHAPE))
    whole = shapes_of(ModelConfig(hidden_size=32, layers=2, heads=4, lora=LoRAConfig(rank=LORA["r"], alpha=8)))
    linear = [m for name, m in policy.model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    inner = 8 * 32 // 3 - SHAPE["intermediate_size"]  # the embedded model's MLP is wider
    assert whole.count(trained=True) == LORA["r"] * (
        sum(m.in_features + m.out_features for m in linear) + 2 * 3 * inner
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_that_autograd_saves_within_a_fifth(dtype, checkpointing, tmp_path):
    shape = {**SHAPE, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6}
    policy = Policy(Qwen2Config(**shape), getattr(torch, dtype), checkpointing=checkpointing)
    policy.model.train()
    [batch] = pack([Trajectory("p", [3] * 60, [Turn(1, 60)])], 64)
    saved, parameters = [], {p.untyped_storage().data_ptr() for p in policy.model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.hidden(batch)
    Qwen2Config(**shape).save_pretrained(tmp_path)
    model = {"path": str(tmp_path), "dtype": dtype, "gradient_checkpointing": checkpointing}
    train = {"max_tokens": 60, "max_length": 60}
    raw = {"name": "t", "model": model, "train": train, "rollout": {"max_new_tokens": 8}}
    assert scale.plan(scale.parse(raw), 1).activations == pytest.approx(held(saved), rel=0.2)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs/papers").glob("*.yaml")))
def test_each_paper_has_a_recipe_that_fits_four_and_eight_gpus_of_80_gb(name):
    recipes = [settings for recipe, settings in scale.RECIPES if recipe == name]
    assert recipes
    config = load(ROOT / "configs/papers" / f"{name}.yaml", recipes[-1])
    for ranks in (4, 8):
        assert scale.plan(config, ranks).peak <= scale.ROOM * scale.GPUS["h100"]


def test_the_documentation_holds_what_the_commands_print():
    assert scale.models() in (ROOT / "docs/scale.md").read_text()
    assert scale.largest() in (ROOT / "docs/trainer.md").read_text()
    assert scale.papers() in (ROOT / "docs/reproduce.md").read_text()


def test_a_config_is_answered_with_what_fits_and_what_does_not(capsys):
    scale.main(["papers/a-qwen2.5-7b", "--ranks", "1", "8", "--set", "train.shard=fsdp"])
    said = capsys.readouterr().out
    assert "| no, " in said
    assert "| yes |" in said
    assert "The fewest GPUs of kind h100 that hold it: 4 (" in said
    scale.main(["papers/b-qwen3-8b-tooluse", "--ranks", "8"])
    assert "It fits no number of GPUs of kind h100: a rank needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["papers/a-qwen2.5-3b", "--ranks", "0"], "--ranks [0] must be 1 to 1,024"),
        (["papers/a-qwen2.5-3b", "--set", "model.path=nobody/knows"], "model.path 'nobody/knows' is neither a folder"),
        (["quickstart", "--set", "train.shard=fsdp", "train.shard_head=true"], "set train.shard_head=false"),
    ],
)
def test_what_cannot_be_computed_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        scale.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())
