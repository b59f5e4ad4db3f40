"""The engine on a real vLLM server: ten online steps with a crash in the middle, adapters, and servers that are refused."""

from __future__ import annotations

import json
import urllib.request

import pytest
import torch
from conftest import MODEL

from drift.config import EngineConfig, EvalConfig, LoRAConfig, parse
from drift.engines import EngineError
from drift.engines.hf import HFEngine
from drift.engines.vllm import COMPLETIONS, RPC, VLLMEngine
from drift.jobs.evaluate import evaluate
from drift.jobs.warm_start import warm_start
from drift.model.policy import load_policy
from drift.online import train_online
from drift.tasks import load_task

pytestmark = pytest.mark.timeout(900)  # minutes are for a machine with other work
STEPS, CRASH = 10, 5
PARITY = 1e-4  # nats, between vLLM's float32 and transformers'
CONFIG = {
    "name": "vllm",
    "model": MODEL.model_dump(),
    "task": {
        "name": "chain_sum",
        "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "warm_problems": 50,
        "train_problems": 24,
        "eval_problems": 8,
    },
    "warm_start": {"target_low": 0.1, "target_high": 0.97, "check_every": 20, "check_problems": 20, "lr": 4e-3},
    "rollout": {"n": 4, "turns": 2, "max_new_tokens": 8, "temperature": 0.9},
    "train": {"lr": 1e-3, "max_tokens": 2048, "max_length": 256},
    "online": {"algorithm": "grpo", "steps": STEPS, "prompts": 6},
    "track": {"progress": False},
}


def settings(server, **changes):
    return EngineConfig(kind="vllm", url=server.url, **changes)


def logprobs(policy, prompt, sample, temperature):
    """The policy's own, of a sample's tokens."""
    ids = torch.tensor([prompt + sample.token_ids])
    with policy.inference():
        logits = (
            policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1].float()
        )
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]


def gap(policy, prompts, samples, temperature):
    """Nats by which the server's log-probs differ from the policy's own, at most."""
    pairs = zip(prompts, samples)
    return max(
        float((torch.tensor(s.logprobs) - logprobs(policy, p, s, temperature)).abs().max())
        for p, s in pairs
        if s.token_ids
    )


def prompts_of(policy, count=8):
    draw = torch.Generator().manual_seed(5)
    sizes = torch.randint(1, 40, (count,), generator=draw).tolist()
    return [torch.randint(policy.head().weight.shape[0], (size,), generator=draw).tolist() for size in sizes]


class Watched(VLLMEngine):
    """Compares after every handover and of every sample, by a way of its own, and has the server killed once."""

    server = None
    batches, crashed = 0, False

    def __init__(self, policy, config):
        self.before, self.gaps, self.moved, self.versions = load_policy(MODEL), [], [], []
        super().__init__(policy, config)
        client = self.servers[0].client
        self.once, client.once = client.once, self.ask_once

    def sync(self):
        super().sync()
        prompts = prompts_of(self.policy)
        samples = super().generate(prompts, max_new_tokens=8, temperature=0.7, seed=1)
        self.gaps.append(gap(self.policy, prompts, samples, 0.7))
        self.moved.append(gap(self.before, prompts, samples, 0.7))
        self.versions.append(self.version)
        self.before.restore(self.policy.state())

    def generate(self, prompts, **options):
        self.batches += 1
        samples = super().generate(prompts, **options)
        assert gap(self.policy, prompts, samples, options["temperature"]) < PARITY
        return samples

    def ask_once(self, path, body=None, stop=None):
        answer = self.once(path, body, stop)
        if path == COMPLETIONS and len(self.versions) == CRASH and body["max_tokens"] == 8 and not self.crashed:
            type(self).crashed = True  # the batch has begun
            self.server.kill()
            self.server.start()
        return answer


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Trained to solve some sums, in process."""
    config, made = parse(CONFIG), load_policy(MODEL, seed=0)
    task = load_task(config.task)
    warm_start(made, HFEngine(made), task, config, tmp_path_factory.mktemp("warm"))
    task.close()
    return made


def test_ten_online_steps_and_a_crash(policy, server):
    config = parse(CONFIG)
    task = load_task(config.task)
    Watched.server = server
    with Watched(policy, settings(server)) as engine:
        stats = train_online(policy, engine, task, task.problems("train"), config, seed=0)
        assert stats.steps == STEPS
        assert stats.skipped == 0
        assert engine.crashed
        assert engine.repeated == 1
        assert len(set(engine.versions)) >= STEPS - 2  # a step whose groups have no spread moves nothing
        assert engine.handovers == len(set(engine.versions)) + 1
        assert len(engine.gaps) == STEPS
        assert max(engine.gaps) < PARITY
        moved = [by for by, now, last in zip(engine.moved[1:], engine.versions[1:], engine.versions) if now != last]
        assert min(moved) > 10 * PARITY  # so that stale weights would have shown
    task.close()


def test_the_same_call_gives_the_same_samples_and_greedy_ones_are_the_policys(policy, server):
    prompts = [[5, 6, 7]] * 16 + prompts_of(policy)
    with VLLMEngine(policy, settings(server)) as engine:
        engine.sync()
        one, two = (engine.generate(prompts, max_new_tokens=8, temperature=1.0, seed=3) for _ in range(2))
        assert [sample.token_ids for sample in one] == [sample.token_ids for sample in two]
        assert len({tuple(sample.token_ids) for sample in one[:16]}) > 8
        greedy = engine.generate(prompts, max_new_tokens=8, temperature=0.0)
        chatted = engine.chat([[{"role": "user", "content": "3 + 4 ="}]], max_new_tokens=8, temperature=1.0, seed=3)
    own = HFEngine(policy).generate(prompts, max_new_tokens=8, temperature=0.0)
    assert [sample.token_ids for sample in greedy] == [sample.token_ids for sample in own]
    rendered = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 + 4 ="}], add_generation_prompt=True, return_dict=False
    )
    [(prompt, sample)] = chatted
    assert prompt == rendered
    assert gap(policy, [prompt], [sample], 1.0) < PARITY


class Kept:
    """An engine that keeps what it was asked for, and its samples."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []

    def generate(self, prompts, **options):
        samples = self.engine.generate(prompts, **options)
        self.calls.append((prompts, options, samples))
        return samples


def mass_above(policy, prompt, sample, temperature):
    """For each sampled token, the probability of all tokens that are likelier: below top_p inside the nucleus."""
    ids = torch.tensor([prompt + sample.token_ids])
    with policy.inference():
        logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
    chances = torch.softmax(logits.double() / temperature, -1)
    own = chances.gather(1, torch.tensor(sample.token_ids)[:, None])
    return (chances * (chances > own * (1 + 1e-4))).sum(-1)  # a tie in the last bits is none


def check_cut(policy, engine, task):
    """One-turn samples of an evaluation at top_p=0.9 are within the nucleus, and those at 1 are not all."""
    worst = {}
    for top_p in (0.9, 1.0):
        how = EvalConfig(turns=1, samples=16, temperature=1.0, top_p=top_p, max_new_tokens=8)
        kept = Kept(engine)
        evaluate(policy, kept, task, task.problems("eval"), how)
        cut = [call for call in kept.calls if call[1]["temperature"] > 0]
        assert {options["top_p"] for _, options, _ in cut} == {top_p}
        masses = [
            mass_above(policy, prompt, sample, 1.0)
            for prompts, _, samples in cut
            for prompt, sample in zip(prompts, samples, strict=True)
        ]
        assert len(masses) == 16 * len(task.problems("eval"))
        worst[top_p] = float(torch.cat(masses).max())
    assert worst[0.9] < 0.9 + PARITY
    assert worst[1.0] > 0.9 + 10 * PARITY  # so that samples without the cut would have shown


def test_an_evaluation_with_a_cut_samples_from_the_nucleus(policy, server):
    task = load_task(parse(CONFIG).task)
    with VLLMEngine(policy, settings(server)) as engine:
        engine.sync()
        check_cut(policy, engine, task)
    task.close()


def test_a_reload_that_forgets_the_tied_head_is_seen(policy, server):
    """What vLLM's own route does on a CPU, and why the workers are extended."""
    with VLLMEngine(policy, settings(server)) as engine:
        engine.sync()
        [one] = engine.servers
        ordinary, kept = one._call, policy.state()

        def plain(stop, method, *arguments):
            if method == "drift_load":
                one.client.ask(RPC, {"method": "reload_weights", "kwargs": {"weights_path": arguments[0]}})
                return
            ordinary(stop, method, *arguments)

        with torch.no_grad():
            policy.causal_lm.get_input_embeddings().weight.mul_(1.1)
        one._call = plain
        with pytest.raises(EngineError, match="differ from the policy's"):
            engine.sync()
        policy.restore(kept)


def test_adapters(policy, server, tmp_path):
    with VLLMEngine(policy, settings(server)) as engine:
        engine.sync()  # the base
    policy.save(tmp_path)
    lora = LoRAConfig(rank=4, alpha=8.0)
    adapted = load_policy(MODEL.model_copy(update={"path": str(tmp_path), "lora": lora}), seed=0)
    prompts = prompts_of(adapted)
    with VLLMEngine(adapted, settings(server)) as engine:
        for _ in range(3):
            engine.sync()
            samples = engine.generate(prompts, max_new_tokens=8, temperature=0.7, seed=1)
            assert gap(adapted, prompts, samples, 0.7) < PARITY
            with torch.no_grad():
                for parameter in adapted.model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            assert gap(adapted, prompts, samples, 0.7) > 10 * PARITY
        with urllib.request.urlopen(f"{server.url}/v1/models") as answer:
            served = [model["id"] for model in json.load(answer)["data"]]
        assert [name for name in served if name.startswith("drift-")] == [engine.servers[0].model]


def test_a_server_whose_log_probs_are_those_before_temperature_is_refused(policy, started):
    unfit = started["unfit"].ready()
    with (
        VLLMEngine(policy, settings(unfit)) as engine,
        pytest.raises(EngineError, match="before temperature; --logprobs-mode processed_logprobs"),
    ):
        engine.sync()


def test_a_server_without_runtime_adapters_is_refused(base, started):
    unfit = started["unfit"].ready()
    adapted = load_policy(MODEL.model_copy(update={"path": str(base), "lora": LoRAConfig(rank=4, alpha=8.0)}))
    with (
        VLLMEngine(adapted, settings(unfit)) as engine,
        pytest.raises(EngineError, match=r"does not take adapters at run time[\s\S]*--enable-lora"),
    ):
        engine.sync()


def test_transformers_serve_is_refused(base, started):
    server = started["transformers"].ready()
    with pytest.raises(EngineError, match=r"lacks what training needs: .*return_token_ids"):
        VLLMEngine(load_policy(MODEL.model_copy(update={"path": str(base)})), settings(server))
