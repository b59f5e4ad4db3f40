"""The policy: the tiny one, the loading path for any other, LoRA, and what the in-process engine samples from it."""

import json

import pytest
import torch
import transformers

import drift_kernels as dk
from drift.config import LoRAConfig, ModelConfig
from drift.engines import hf
from drift.engines.hf import HFEngine, draw
from drift.model import chat
from drift.model.policy import Policy, load_policy
from drift.packing import pack
from drift.types import Trajectory, Turn

QUESTION = [{"role": "user", "content": "State the final answer to the following arithmetic problem: 14 + 3 ="}]


@pytest.fixture(scope="module")
def policy():
    return load_policy(ModelConfig(), seed=3)


def prompts_of(policy, count=6):
    words = ["14 + 3 =", "Incorrect. Please think again.", "7", "Sort these numbers: 3 1 2", "é ü 漢字", "x" * 40]
    return [chat.render(policy.tokenizer, [{"role": "user", "content": w}], True) for w in words[:count]]


def test_tiny_policy_follows_from_its_seed(policy):
    assert load_policy(ModelConfig(), seed=3).hash() == policy.hash() != load_policy(ModelConfig(), seed=4).hash()
    assert sum(p.numel() for p in policy.model.parameters()) < 1_000_000


def test_tiny_tokenizer_spells_any_text_and_keeps_digits_and_tags_single(policy):
    for said in ("<think>\n12 + 3?</think><answer>-105</answer>", "漢字 é\t¿", "Incorrect. Please think again."):
        assert policy.tokenizer.decode(chat.encode(policy.tokenizer, said)) == said
    assert len(chat.encode(policy.tokenizer, "<answer>105</answer><|im_end|>")) == 6


def test_saved_policy_loads_through_the_ordinary_path(policy, tmp_path):
    policy.save(tmp_path / "model")
    again = load_policy(ModelConfig(path=str(tmp_path / "model")))
    assert again.hash() == policy.hash()
    assert again.eos_ids == policy.eos_ids
    assert chat.render(again.tokenizer, QUESTION, True) == chat.render(policy.tokenizer, QUESTION, True)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "qwen2"


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "~/model", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_up(path):
    with pytest.raises(ValueError, match=f"model.path='{path}' is neither a folder that is there nor a hub name"):
        load_policy(ModelConfig(path=path))


def test_state_and_restore(policy):
    state, before = policy.state(), policy.hash()
    with torch.no_grad():
        next(policy.model.parameters()).add_(1)
    assert policy.hash() != before
    policy.restore(state)
    assert policy.hash() == before
    with pytest.raises(ValueError, match="not this policy's"):
        policy.restore({"other": torch.zeros(1)})


def test_lora_trains_adapters_alone_and_saves_them(tmp_path):
    base = load_policy(ModelConfig(), seed=1)
    base.save(tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"), lora=LoRAConfig(rank=2, alpha=4.0))
    lora = load_policy(config)
    trained = [name for name, p in lora.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not lora.head().weight.requires_grad
    with torch.no_grad():
        for p in lora.model.parameters():
            if p.requires_grad:
                p.add_(0.01)
    lora.save(tmp_path / "adapters")
    again = load_policy(ModelConfig(path=str(tmp_path / "adapters")))
    batch = pack([Trajectory("p", list(range(3, 13)), [Turn(5, 10)])], 64)[0]
    torch.testing.assert_close(again.hidden(batch), lora.hidden(batch))
    assert not torch.allclose(again.hidden(batch), base.hidden(batch))
    assert (tmp_path / "adapters" / "adapter_config.json").is_file()


def test_adapters_follow_from_the_seed():
    lora = {"hidden_size": 16, "layers": 1, "heads": 2, "lora": {"rank": 2, "alpha": 4}}
    states = [load_policy(ModelConfig(**lora), seed=seed).state() for seed in (5, 5, 6)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0] if "lora_A" in name)


def test_adapters_on_the_head_are_refused(tmp_path):
    load_policy(ModelConfig(), seed=1).save(tmp_path)
    policy = load_policy(ModelConfig(path=str(tmp_path), lora=LoRAConfig(rank=2, alpha=4.0, target_modules=["q_proj"])))
    policy.causal_lm.set_output_embeddings(torch.nn.Sequential(policy.causal_lm.get_output_embeddings()))
    with pytest.raises(NotImplementedError, match="the head is a Sequential"):
        policy.head()


def test_packed_log_probs_are_those_of_the_model_alone_and_of_the_sampler(policy):
    """One number three ways: the fused op over a pack, the causal LM on each row alone, the engine while sampling."""
    prompts = prompts_of(policy)
    samples = HFEngine(policy, batch_size=4).generate(prompts, max_new_tokens=7, temperature=1.0, top_p=1.0, seed=5)
    trajectories = [
        Trajectory(
            str(i),
            p + s.token_ids,
            [Turn(len(p), len(p) + len(s.token_ids))],
            index=i,
            logprobs=[0.0] * len(p) + s.logprobs,
        )
        for i, (p, s) in enumerate(zip(prompts, samples))
    ]
    for batch in pack(trajectories, 4096):
        with torch.no_grad():
            packed = dk.linear_logprob(policy.hidden(batch), policy.head(), batch.targets).logprobs
        torch.testing.assert_close(packed[batch.active], batch.rollout_logprobs[batch.active], rtol=1e-4, atol=1e-4)
    for t in trajectories:
        with policy.inference():
            logits = policy.model(input_ids=torch.tensor([t.token_ids])).logits[0, :-1]
        turn = t.turns[0]
        alone = torch.log_softmax(logits, -1).gather(1, torch.tensor(t.token_ids[1:])[:, None])[
            turn.start - 1 : turn.stop - 1, 0
        ]
        torch.testing.assert_close(alone, torch.tensor(t.logprobs[turn.start :]), rtol=1e-4, atol=1e-4)


def test_greedy_equals_transformers_generate(policy):
    prompts = prompts_of(policy)
    ours = HFEngine(policy, batch_size=3).generate(prompts, max_new_tokens=12, temperature=0.0)
    for prompt, sample in zip(prompts, ours):
        ids = torch.tensor([prompt])
        theirs = policy.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert sample.token_ids == theirs[0, len(prompt) :].tolist()
        assert sample.finished == (sample.token_ids[-1] in policy.eos_ids)


def test_sampling_repeats_by_seed_and_differs_between_siblings(policy):
    engine, prompts = HFEngine(policy), prompts_of(policy, 1) * 40
    first, again, other = (engine.generate(prompts, max_new_tokens=5, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert len({tuple(s.token_ids) for s in first}) > 10


def conversation(policy, engine, turns=4):
    """Samples of siblings and others, each of whose prompts goes on from some of the samples before, in another order."""
    prompts, rounds = prompts_of(policy) + prompts_of(policy, 2) * 3, []
    for turn in range(turns):
        rounds.append(engine.generate(prompts, max_new_tokens=6, seed=turn))
        told = chat.encode(policy.tokenizer, "<|im_end|>\nNo." + "!" * turn)
        longer = [p + s.token_ids + told for p, s in zip(prompts, rounds[-1])]
        prompts = [*longer[::-2], prompts[0], prompts[1][:-2] + told, *longer[::3]]  # of one, all but its end is new
    return rounds


@pytest.mark.parametrize("batch_size", [4, 512])
def test_what_is_remembered_changes_no_sample(policy, batch_size, monkeypatch):
    plain, engine, read = HFEngine(policy, batch_size), HFEngine(policy, batch_size), []
    forward = policy.model.forward
    monkeypatch.setattr(policy.model, "forward", lambda **o: read.append(o["input_ids"].numel()) or forward(**o))
    expected, alone = conversation(policy, plain), sum(read)
    read.clear()
    with engine.remembering():
        found = conversation(policy, engine)
    assert sum(read) < 0.7 * alone
    for ours, theirs in zip(found, expected):
        assert [s.token_ids for s in ours] == [s.token_ids for s in theirs]
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-4)
    assert engine.memory is None  # nothing is left, and nothing that other weights could meet
    read.clear()
    conversation(policy, engine)
    assert sum(read) == alone


def test_memory_ends_where_its_bytes_do(policy, monkeypatch):
    monkeypatch.setattr(hf, "REMEMBERED", 30_000)  # some rows of the first turns
    engine = HFEngine(policy)
    with engine.remembering():
        found = conversation(policy, engine)
        assert 0 <= engine.memory.bytes <= 30_000
    expected = conversation(policy, HFEngine(policy))
    assert [[s.token_ids for s in turn] for turn in found] == [[s.token_ids for s in turn] for turn in expected]


def test_sliding_windows_are_not_remembered():
    model = transformers.MistralConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        sliding_window=8,
    )
    model.num_key_value_heads, model.eos_token_id = 2, 2
    policy = Policy(transformers.MistralForCausalLM(model).eval(), load_policy(ModelConfig()).tokenizer)
    engine = HFEngine(policy)
    with engine.remembering():
        found = conversation(policy, engine)
        assert not engine.memory.blocks
    assert [[s.token_ids for s in turn] for turn in found] == [
        [s.token_ids for s in turn] for turn in conversation(policy, HFEngine(policy))
    ]


def test_draw_follows_temperature_and_top_p():
    logits, count = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1), 20_000
    chances = torch.arange(count, dtype=torch.float64) / count
    for temperature, top_p, kept in ((1.0, 1.0, 4), (0.5, 1.0, 4), (1.0, 0.7, 2), (1.0, 0.1, 1)):
        tokens, logprobs = draw(logits, temperature, top_p, chances)
        p = torch.softmax(logits[0] / temperature, -1)
        torch.testing.assert_close(logprobs, p.log()[tokens])
        p[kept:] = 0
        share = torch.bincount(tokens, minlength=4) / len(tokens)
        torch.testing.assert_close(share, p / p.sum(), rtol=0, atol=1e-4)
    tokens, logprobs = draw(logits[:1], 0.0, 1.0, chances[:1])
    assert tokens.item() == 0
    torch.testing.assert_close(logprobs, torch.log_softmax(logits[:1], -1)[:, 0])


def test_draw_never_takes_a_token_that_top_p_cut_off():
    logits = torch.tensor([[-3.0, 9.0, -3.0, 8.0, -3.0]]).repeat(2, 1)
    tokens, _ = draw(logits, 1.0, 0.9, torch.tensor([0.0, 1 - 2.0**-32], dtype=torch.float64))
    assert tokens.tolist() == [1, 3]


def test_a_sample_follows_from_its_prompt_and_its_seed_whatever_is_sampled_with_it(policy):
    engine, how = HFEngine(policy, batch_size=3), {"max_new_tokens": 12, "temperature": 1.0}
    prompts, seeds = [[5, 6, 7], [8], [9, 10, 11, 12], [5, 6, 7], [8]], [11, 12, 13, 14, 12]
    together = [sample.token_ids for sample in engine.generate(prompts, seed=seeds, **how)]
    by_itself = [engine.generate([p], seed=[s], **how)[0].token_ids for p, s in zip(prompts, seeds)]
    assert together == by_itself
    assert together[1] == together[4]
    assert together[0] != together[3]
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        engine.generate(prompts[:3], seed=[1, 2], **how)


def test_engine_refuses_what_it_cannot_do(policy):
    engine = HFEngine(policy)
    with pytest.raises(ValueError, match="temperature -1"):
        engine.generate([[1]], max_new_tokens=1, temperature=-1)
    with pytest.raises(ValueError, match=r"top_p 0"):
        engine.generate([[1]], max_new_tokens=1, top_p=0)
    with pytest.raises(ValueError, match="number 1 is empty"):
        engine.generate([[1], []], max_new_tokens=1)
    assert engine.generate([], max_new_tokens=1) == []


def test_gradient_checkpointing_is_on_where_asked():
    plain, frugal = (load_policy(ModelConfig(gradient_checkpointing=on), seed=2) for on in (False, True))
    batch, grads = pack([Trajectory("p", list(range(3, 13)), [Turn(5, 10)])], 64)[0], []
    for policy in (plain, frugal):
        policy.model.train()
        policy.hidden(batch).square().sum().backward()
        grads.append([p.grad for p in policy.model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])
    assert not plain.causal_lm.base_model.layers[0].gradient_checkpointing
    assert frugal.causal_lm.base_model.layers[0].gradient_checkpointing


def test_a_name_that_is_no_folder_and_not_on_the_hub_says_both(monkeypatch):
    def unreachable(*arguments, **options):
        raise OSError("We couldn't connect to the hub\nmore")

    monkeypatch.setattr("drift.model.policy.AutoTokenizer.from_pretrained", unreachable)
    with pytest.raises(
        ValueError, match=r"model\.path='nope' is not a folder here, and the hub does not give it: We could"
    ):
        load_policy(ModelConfig(path="nope"))
