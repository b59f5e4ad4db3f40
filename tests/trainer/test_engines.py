"""The engine on a vLLM server, against a stand-in for one (tests/vllm_server has the real thing); the engine in process is in
test_policy.py."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_vllm_server import StandIn
from peft import LoraConfig
from scripted_engine import WordTask
from tiny_policy import LORA, TOKENIZER, Policy, causal_lm
from tiny_policy import SHAPE as SMALL
from transformers.models.qwen2 import Qwen2Config

from drift.config import Config, EngineConfig, parse
from drift.engines import EngineError, client, open_engine
from drift.engines.client import backoff
from drift.engines.hf import HFEngine
from drift.engines.vllm import VLLMEngine
from drift.online import train_online

pytest.importorskip("httpcore2")  # wants Python 3.11

SHAPE = SMALL | {"vocab_size": len(TOKENIZER), "eos_token_id": 2}
PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [10, 11, 12, 13], [5, 6, 7]]
HOW = {"max_new_tokens": 6, "temperature": 0.8, "top_p": 1.0}


def shape(**changes):
    return Qwen2Config(**{**SHAPE, **changes}, tie_word_embeddings=True, initializer_range=0.2)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(client, "FIRST_DELAY", 0.01)


@pytest.fixture
def policy():
    return Policy(shape())


@pytest.fixture
def server():
    torch.manual_seed(1)
    model = causal_lm(shape())
    perturb(model)  # so that the weights it starts with are not the policy's
    with StandIn(model) as standing:
        yield standing


def perturb(model, by=0.1):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))


def settings(server, **changes):
    return EngineConfig(kind="vllm", url=server.url, **{"wait": 20.0, "retries": 2, "timeout": 20.0, **changes})


def opened(policy, server, **changes):
    return open_engine(settings(server, **changes), policy, 8)


def impatient(engine, seconds):
    """A time-out from here on: what opens the engine may take its time on a busy machine."""
    for one in engine.servers:
        one.client.timeout = seconds


def as_pairs(samples):
    return [(sample.token_ids, sample.finished) for sample in samples]


def score(policy, prompt, sample, temperature):
    """The policy's own log-probs of a sample."""
    ids = torch.tensor([prompt + sample.token_ids])
    with policy.inference():
        logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
    steps = range(len(prompt) - 1, ids.shape[1] - 1)
    return torch.log_softmax(logits[list(steps)] / temperature, -1).gather(1, torch.tensor(sample.token_ids)[:, None])[
        :, 0
    ]


def agree(policy, prompts, samples, temperature=0.8):
    for prompt, sample in zip(prompts, samples):
        torch.testing.assert_close(
            torch.tensor(sample.logprobs), score(policy, prompt, sample, temperature), atol=1e-4, rtol=0
        )


# --- sampling ---


def test_samples_come_back_in_order_with_the_policys_log_probs(policy, server):
    with opened(policy, server) as engine:
        samples = engine.generate(PROMPTS, seed=3, **HOW)
        again = engine.generate(PROMPTS, seed=3, **HOW)
        other = engine.generate(PROMPTS, seed=4, **HOW)
        backwards = engine.generate(PROMPTS[::-1], seed=3, **HOW)
    for prompts, found in ((PROMPTS, samples), (PROMPTS[::-1], backwards)):
        agree(policy, prompts, found)
    assert as_pairs(samples) == as_pairs(again) != as_pairs(other)
    assert len({tuple(samples[i].token_ids) for i in (0, 2, 4)}) == 3  # of one prompt, yet of different seeds
    for sample in samples:
        assert sample.finished == (sample.token_ids[-1] in policy.eos_ids)
        assert 1 <= len(sample.token_ids) <= 6


def test_equal_prompts_are_one_request_for_several_samples_unless_greedy(policy, server):
    with opened(policy, server) as engine:
        del server.bodies[:]
        engine.generate(PROMPTS, seed=3, **HOW)
        assert sorted((body["n"], body["prompt"]) for _, body in server.bodies) == [
            (1, [8, 9]), (1, [10, 11, 12, 13]), (3, [5, 6, 7]),
        ]  # fmt: skip
        assert len({body["seed"] for _, body in server.bodies}) == 3
        del server.bodies[:]
        greedy = engine.generate(PROMPTS, seed=3, **{**HOW, "temperature": 0.0})
        assert [body["n"] for _, body in server.bodies] == [1] * 5
    own = HFEngine(policy).generate(PROMPTS, max_new_tokens=6, temperature=0.0)
    assert as_pairs(greedy) == as_pairs(own)
    agree(policy, PROMPTS, greedy, 1.0)


def test_nothing_that_shapes_the_distribution_is_left_to_the_server(policy, server):
    with opened(policy, server) as engine:
        engine.generate(PROMPTS, seed=3, **HOW)
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
    assert all({**body, **neutral} == body for _, body in server.bodies)


def test_a_cut_reaches_the_server_and_leaves_no_logprobs(policy, server):
    """The server's log-probs are those after the cut; nothing may train on them."""
    with opened(policy, server) as engine:
        del server.bodies[:]
        samples = engine.generate(PROMPTS, seed=3, **{**HOW, "top_p": 1e-6})
    assert {body["top_p"] for _, body in server.bodies} == {1e-6}
    greedy = HFEngine(policy).generate(PROMPTS, max_new_tokens=6, temperature=0.0)
    assert [sample.token_ids for sample in samples] == [sample.token_ids for sample in greedy]
    assert all(math.isnan(value) for sample in samples for value in sample.logprobs)
    assert [len(sample.logprobs) for sample in samples] == [len(sample.token_ids) for sample in samples]


def test_chat_prompts_bring_the_servers_own_prompt_ids(policy, server):
    with opened(policy, server) as engine:
        found = engine.chat([[{"role": "user", "content": "hi"}]] * 2, max_new_tokens=4, temperature=0.8, seed=1)
    assert [prompt for prompt, _ in found] == [[7, 8, 9]] * 2
    agree(policy, [[7, 8, 9]] * 2, [sample for _, sample in found])
    assert found[0][1].token_ids != found[1][1].token_ids


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_in_flight_than_asked_for(policy, server, concurrency):
    prompts = [[5, 6 + i] for i in range(12)]
    with opened(policy, server, concurrency=concurrency) as engine:
        server.delay = 0.03
        agree(policy, prompts, engine.generate(prompts, seed=0, **HOW))
    assert server.most_in_flight == concurrency


def test_the_bar_counts_samples(policy, server):
    class Bar:
        seen = 0

        def advance(self, by):
            self.seen += by

    bar = Bar()
    with opened(policy, server) as engine:
        server.faults = [None, "restart"]
        engine.generate(PROMPTS, seed=3, bar=bar, **HOW)
    assert bar.seen == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0.0}, r"top_p 0\.0"),
        ({"top_p": 1.1}, r"top_p 1\.1"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"prompts": [[1], []]}, "number 1 is empty"),
    ],
)
def test_what_cannot_be_sampled_is_refused(policy, server, changes, message):
    with opened(policy, server) as engine, pytest.raises(ValueError, match=message):
        engine.generate(changes.pop("prompts", PROMPTS), seed=0, **{**HOW, **changes})


# --- failures ---


@pytest.mark.parametrize("fault", [503, 429, 500, "drop", "abort", 2.0, "drip"])
def test_what_may_pass_is_tried_again_and_gives_the_same_samples(policy, server, fault):
    with opened(policy, server, retries=4) as engine:
        whole = engine.generate(PROMPTS, seed=3, **HOW)
        del server.bodies[:]
        server.faults = [None, fault, fault]
        slow = fault in (2.0, "drip")
        if slow:
            impatient(engine, 1.5)
        assert as_pairs(engine.generate(PROMPTS, seed=3, **HOW)) == as_pairs(whole)
        assert len(server.bodies) >= 3 + 2 if slow else len(server.bodies) == 3 + 2
        assert engine.repeated == 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (503, "HTTP 503: made up"),
        ("abort", "'abort'"),
        (1.5, "engine.timeout=1 s"),
        ("drip", "no whole answer within engine.timeout=1 s"),
        ("drip headers", "no whole answer within engine.timeout=1 s"),
    ],
)
def test_it_gives_up_in_words(policy, server, fault, words):
    with opened(policy, server) as engine:
        if "timeout" in words:
            impatient(engine, 1.0)
        server.faults = [fault] * 99
        with pytest.raises(EngineError, match=rf"{server.url}|completions") as failure:
            engine.generate(PROMPTS[:1], seed=3, **HOW)
        server.faults = []
    assert words in str(failure.value)
    assert "tried 3 times (engine.retries=2)" in str(failure.value)


def test_a_refusal_is_not_tried_again(policy, server):
    with opened(policy, server) as engine:
        del server.bodies[:]
        with pytest.raises(EngineError, match="HTTP 400: This model's maximum context length is 60 tokens"):
            engine.generate([[5] * 61], seed=3, **HOW)
    assert len(server.bodies) == 1


def test_one_request_that_fails_ends_the_others(policy, server):
    prompts = [[5, 6 + i] for i in range(40)]
    with opened(policy, server, concurrency=2) as engine:
        del server.bodies[:]
        server.delay, server.faults = 0.02, [None, None, 400]
        with pytest.raises(EngineError, match="HTTP 400"):
            engine.generate(prompts, seed=3, **HOW)
        assert len(server.bodies) < 10
        server.delay = 0.0
        agree(policy, prompts, engine.generate(prompts, seed=3, **HOW))


def test_a_batch_that_fails_and_an_engine_that_is_closed_hang_up(policy, server):
    """Nobody waits for requests in flight; the server drops those whose connection is gone."""
    gates = [threading.Event(), threading.Event()]
    with opened(policy, server, concurrency=2, timeout=90.0) as engine:  # longer than a gate holds
        server.faults = [gates[0], 400]
        with pytest.raises(EngineError, match="HTTP 400"):
            engine.generate(PROMPTS[:2], seed=3, **HOW)
        assert server.in_flight == 1
        gates[0].set()
        server.faults = [gates[1]]
        sampling = ThreadPoolExecutor(1).submit(engine.generate, PROMPTS[:1], seed=3, **HOW)
        while gates[1] in server.faults:
            time.sleep(0.01)
    with pytest.raises(client.Stopped):
        sampling.result()
    assert server.in_flight == 1
    gates[1].set()


def test_weights_are_not_handed_over_while_a_batch_is_sampled(policy, server):
    gate = threading.Event()
    with opened(policy, server) as engine, ThreadPoolExecutor(1) as pool:
        before = engine.generate(PROMPTS, seed=3, **HOW)
        server.faults = [gate]
        sampling = pool.submit(engine.generate, PROMPTS, seed=3, **HOW)
        while gate in server.faults:
            time.sleep(0.01)
        perturb(policy.model)
        with pytest.raises(RuntimeError, match="a batch is being sampled"):
            engine.sync()
        gate.set()
        assert as_pairs(sampling.result()) == as_pairs(before)
        engine.sync()
        agree(policy, PROMPTS, engine.generate(PROMPTS, seed=3, **HOW))


def test_weights_that_the_server_holds_are_not_loaded_again(policy, server):
    """Another rank's, or an earlier stage's; they are compared all the same."""
    with opened(policy, server) as first, opened(Policy(shape()), server) as second:
        assert (first.handovers, second.handovers) == (1, 0)
        agree(policy, PROMPTS, second.generate(PROMPTS, seed=3, **HOW))
        server.boot()
        agree(policy, PROMPTS, second.generate(PROMPTS, seed=3, **HOW))
        agree(policy, PROMPTS, first.generate(PROMPTS, seed=3, **HOW))
        assert (first.handovers, second.handovers) == (1, 1)
        with torch.no_grad():
            server.model.lm_head.weight.mul_(1.5)
        with pytest.raises(EngineError, match="differ from the policy's"), opened(policy, server):
            pass


def test_a_server_that_stays_away_is_named(policy):
    with StandIn(causal_lm(shape())) as standing:
        engine = VLLMEngine(policy, settings(standing, wait=0.3))
        engine.sync()
    with engine, pytest.raises(EngineError, match=rf"{standing.url}.*waited for over engine.wait=0.3 s"):
        engine.generate(PROMPTS, seed=3, **HOW)


def test_delays_double_and_jitter(monkeypatch):
    monkeypatch.undo()
    for tries, most in ((1, 0.25), (2, 0.5), (5, 4.0), (50, 15.0)):
        drawn = [backoff(tries) for _ in range(200)]
        assert most / 2 <= min(drawn) < 0.6 * most
        assert 0.9 * most < max(drawn) <= most


# --- weights ---


def test_samples_follow_the_weights_that_sync_saw(policy, server):
    with opened(policy, server) as engine:
        before = engine.generate(PROMPTS, seed=3, **HOW)
        engine.sync()
        assert engine.handovers == 1  # nothing had changed
        old = policy.state()
        perturb(policy.model)
        assert as_pairs(engine.generate(PROMPTS, seed=3, **HOW)) == as_pairs(before)
        engine.sync()
        after = engine.generate(PROMPTS, seed=3, **HOW)
        agree(policy, PROMPTS, after)
        assert as_pairs(after) != as_pairs(before)
        assert engine.handovers == 2
        assert engine.gap < 1e-4
        policy.restore(old)
        engine.sync()
        assert as_pairs(engine.generate(PROMPTS, seed=3, **HOW)) == as_pairs(before)
    resets = [name for name, _ in server.calls if name == "/reset_prefix_cache"]
    assert len(resets) == 3


def test_weights_on_disk_are_the_last_ones_and_go_with_the_engine(policy, server, tmp_path):
    with opened(policy, server, folder=str(tmp_path)) as engine:
        perturb(policy.model)
        engine.sync()
        assert [path.name for path in tmp_path.glob("*/*")] == [policy.hash()]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("deaf", [True, "head"])
def test_weights_that_did_not_arrive_stop_the_run(policy, deaf):
    with StandIn(causal_lm(shape()), deaf=deaf) as standing, opened(policy, standing) as engine:  # the policy's weights
        perturb(policy.model)
        with pytest.raises(EngineError, match=r"differ from the policy's by up to .* nats \(engine.tolerance=0.001\)"):
            engine.sync()
        for again in (engine.sync, lambda: engine.generate(PROMPTS, seed=3, **HOW)):
            with pytest.raises(EngineError, match="differ from the policy's"):
                again()


def test_before_the_first_sync_nothing_is_sampled(policy, server):
    with VLLMEngine(policy, settings(server)) as engine, pytest.raises(EngineError, match=r"call sync\(\)"):
        engine.generate(PROMPTS, seed=3, **HOW)


@pytest.mark.parametrize("fault_at", [0, 1, 2])
def test_a_server_that_died_gets_the_weights_again_and_the_batch_is_sampled_again(policy, server, fault_at):
    with opened(policy, server, concurrency=1) as engine:
        whole = engine.generate(PROMPTS, seed=3, **HOW)
        del server.bodies[:]
        server.faults, server.delay = [*[None] * fault_at, "restart"], 0.03
        found = engine.generate(PROMPTS, seed=3, **HOW)
        assert as_pairs(found) == as_pairs(whole)
        assert engine.handovers == 2
        assert engine.repeated == 1
        agree(policy, PROMPTS, found)
        stale = [version for version, body in server.bodies if version is None and body["max_tokens"] > 1]
        assert len(stale) <= 1  # the rest of the batch was given up at once


def test_a_server_that_died_between_batches_gets_the_weights_before_it_samples(policy, server):
    with opened(policy, server) as engine:
        whole = engine.generate(PROMPTS, seed=3, **HOW)
        server.boot()
        del server.bodies[:]
        assert as_pairs(engine.generate(PROMPTS, seed=3, **HOW)) == as_pairs(whole)
        assert engine.handovers == 2
        assert engine.repeated == 0
        assert all(version for version, _ in server.bodies)


def test_a_death_that_no_request_noticed_is_seen_after_the_batch(policy, server):
    """Between two requests of a batch; and another trainer's rank has given it the same weights again."""
    for same_weights in (False, True):
        with opened(policy, server, concurrency=1) as engine:
            whole, version = engine.generate(PROMPTS, seed=3, **HOW), server.version
            ordinary, done = server.complete, []

            def dies(*arguments, done=done, ordinary=ordinary, version=version, same_weights=same_weights):
                answer = ordinary(*arguments)
                done.append(0)
                if len(done) == 2:
                    server.boot()
                    if same_weights:
                        server.model.load_state_dict(policy.model.state_dict())
                        server.version = version
                return answer

            server.complete = dies
            assert as_pairs(engine.generate(PROMPTS, seed=3, **HOW)) == as_pairs(whole)
            assert engine.repeated == 1
            server.complete = ordinary


def test_a_server_that_dies_all_the_time_is_not_waited_for_forever(policy, server):
    with opened(policy, server) as engine:
        ordinary = server.complete

        def dies(name, body, fault):
            if body["max_tokens"] > 1:
                server.boot()
            return ordinary(name, body, None)

        server.complete = dies
        with pytest.raises(EngineError, match="started anew 4 times during one batch"):
            engine.generate(PROMPTS, seed=3, **HOW)


def test_a_server_that_comes_back_is_waited_for(policy, server):
    with opened(policy, server, wait=20.0) as engine:
        whole = engine.generate(PROMPTS, seed=3, **HOW)
        address = server.http.server_address
        server.__exit__()
        server.boot()

        def back():
            time.sleep(0.3)
            server.http = type(server.http)(address, server.http.RequestHandlerClass)
            server.http.daemon_threads = False
            server.thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
            server.thread.start()

        returning = threading.Thread(target=back)
        returning.start()
        found = engine.generate(PROMPTS, seed=3, **HOW)
        returning.join()
        assert as_pairs(found) == as_pairs(whole)
        assert engine.handovers == 2


def test_adapters_are_handed_over_under_a_name_of_their_version():
    policy = Policy(shape(), lora=LoraConfig(**LORA))
    with StandIn(causal_lm(shape())) as standing, opened(policy, standing) as engine:
        before = engine.generate(PROMPTS, seed=3, **HOW)
        assert list(standing.adapters) == [f"drift-{policy.hash()}"]
        perturb(policy.model)
        engine.sync()
        after = engine.generate(PROMPTS, seed=3, **HOW)
        agree(policy, PROMPTS, after)
        assert as_pairs(after) != as_pairs(before)
        assert list(standing.adapters) == [f"drift-{policy.hash()}"]  # the old ones are unloaded
        assert {body["model"] for _, body in standing.bodies[-3:]} == set(standing.adapters)
        standing.boot()
        assert as_pairs(engine.generate(PROMPTS, seed=3, **HOW)) == as_pairs(after)
        assert engine.handovers == 3


def test_adapters_on_another_base_are_seen(server):
    policy = Policy(shape(), lora=LoraConfig(**LORA))
    with pytest.raises(EngineError, match="started from the base that adapters belong to"), opened(policy, server):
        pass


# --- around it ---


def test_the_engine_in_process_is_the_default(policy):
    assert Config(name="x").engine.kind == "hf"
    with open_engine(EngineConfig(), policy, 7) as engine:
        assert isinstance(engine, HFEngine)
        assert engine.batch_size == 7
        engine.sync()


def test_the_online_loop_samples_every_step_from_the_weights_of_that_step(server, tmp_path):
    policy = Policy(shape())
    config = parse(
        {
            "name": "x",
            "online": {"algorithm": "grpo", "steps": 3, "prompts": 2},
            "rollout": {"n": 2, "turns": 1, "max_new_tokens": 4},
            "train": {"lr": 1e-2, "max_tokens": 256, "max_length": 128},
        }
    )
    task, seen = WordTask(2), []
    task.verify = lambda problem, answer: len(seen) % 2 == 0  # so that groups have a spread, and weights move
    with opened(policy, server) as engine:
        ordinary = engine.generate

        def generate(prompts, **options):
            samples = ordinary(prompts, **options)
            agree(policy, prompts, samples, options["temperature"])
            seen.append(policy.hash())
            return samples

        engine.generate = generate
        server.faults = [*[None] * 12, "restart"]
        assert train_online(policy, engine, task, task.made, config, seed=0).steps == 3
        assert len(seen) == 3
        assert engine.handovers >= len(set(seen))
