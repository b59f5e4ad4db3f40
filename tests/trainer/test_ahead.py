"""One step ahead: the same bits as a training that samples first and trains then, and nothing left behind."""

import json
import signal
import sys
import threading
import time
import traceback

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scripted_engine import WordTask, quarters
from tiny_policy import TOKENIZER, causal_lm
from transformers.models.qwen2 import Qwen2Config

from drift import store
from drift.config import parse
from drift.config.algorithms import ALGORITHMS
from drift.engines.hf import HFEngine
from drift.model import chat
from drift.model.policy import Policy, load_policy
from drift.online import loop as online
from drift.online.ahead import Ahead, Still, Stopped
from drift.online.branches import Branches, Denominators
from drift.online.curriculum import Phase
from drift.online.samples import Sample, problems_of
from drift.rhythm import StepMean
from drift.rollouts.rollout import play
from drift.track import Track
from drift.training import checkpoint
from drift.training.optimizer import MasterAdamW
from drift.types import Trajectory, Turn

SETTINGS = {"algorithm": "drift", "ahead": 1, "steps": 5, "prompts": 4}
SETTINGS |= {"curriculum": {"warmup_steps": 1, "transition_steps": 2}}


@pytest.fixture(autouse=True)
def talkative(monkeypatch):
    """An untrained model never writes an answer's tags: what it says counts as one."""
    monkeypatch.setattr("drift.rollouts.rollout.parse_answer", lambda said, tag: said.strip() or None)


def config(folder, **settings):
    made = quarters(folder, train={"save_every": 2})
    return parse({**made.model_dump(mode="json"), "online": SETTINGS | settings, "seeds": [0]})


def task():
    made = WordTask(6)
    made.verify = lambda problem, answer: len(answer) % 2 == 0
    return made


class Keeps(Track):
    """Remembers what is logged, and breaks off at a step."""

    def __init__(self, until=None):
        super().__init__(None, progress=False)
        self.rows, self.until = [], until

    def log(self, step, **metrics):
        self.rows.append({name.removeprefix("online/"): value for name, value in metrics.items()})
        if step == self.until:
            raise InterruptedError


def through(made, rollouts=None, folder=None, track=None, engine=HFEngine):
    policy, words = load_policy(made.model, seed=0), task()
    where = {"checkpoint_dir": folder, "rollouts": rollouts}
    options = {"seed": 3, "track": track or Keeps(), **where}
    stats = online.train_online(policy, engine(policy), words, words.problems("train"), made, **options)
    return policy, stats


class Sequential(online._Loop):
    """No thread: batch k + 1 is sampled with the policy itself, right before the training on batch k."""

    rows = None

    def step(self, number, writer=None, track=None):
        self.now = self.rows or self._sampled(number, number)
        self.rows = self._sampled(number + 1, number) if number + 1 < self.online.steps else None
        return super().step(number, writer, track)

    def _play(self, number, version):
        return self.now

    def _sampled(self, number, version):
        chosen = problems_of(number, len(self.problems), self.online.prompts, self.seed)
        jobs = [(self.problems[i], index) for i in chosen for index in range(self.config.rollout.n)]
        settings = self.config.rollout
        episodes = play(self.policy, HFEngine(self.policy), self.task, jobs, settings, seed=[self.seed, number])
        return [
            {**e.row(settings.format_penalty), "policy_version": version, "unparsed": e.answers.count(None)}
            for e in episodes
        ]


@pytest.mark.parametrize("algorithm", ["grpo", "drift"])
def test_the_same_bits_as_sampling_first(tmp_path, monkeypatch, algorithm):
    rest = {} if algorithm == "drift" else {"curriculum": {}}
    made, tracks = config(tmp_path, algorithm=algorithm, **rest), [Keeps(), Keeps()]
    files = [tmp_path / "ahead.jsonl", tmp_path / "emulated.jsonl"]
    policy, stats = through(made, files[0], track=tracks[0])
    with monkeypatch.context() as patched:
        patched.setattr(online, "_Loop", Sequential)
        patched.setattr(online, "Ahead", lambda device: None)  # what `ahead` means to the losses stays
        emulated, again = through(made, files[1], track=tracks[1])
    assert policy.hash() == emulated.hash() != load_policy(made.model, seed=0).hash()
    assert stats.rewards == again.rewards
    assert files[0].read_bytes() == files[1].read_bytes()
    for ours, theirs in zip(*(track.rows for track in tracks)):
        names = [name for name in theirs if "seconds" not in name and name not in ("step_time", "step_cpu_time")]
        assert [ours[name] for name in names] == [theirs[name] for name in names]
        assert "seconds_waiting" in ours
    rows = store.read(files[0])
    assert [row["staleness"] for row in rows] == [int(row["step"] > 1) for row in rows]
    assert [row["policy_version"] for row in rows] == [max(row["step"] - 2, 0) for row in rows]
    assert [row["staleness"] for row in tracks[0].rows] == [0, 1, 1, 1, 1]
    behind = [abs(row["sampler_kl"]) for row in tracks[0].rows]
    assert behind[0] < 1e-5
    assert min(behind[1:]) > 1e-4  # which is what the correction is for
    together = config(tmp_path, algorithm=algorithm, ahead=0, **rest)
    assert through(together)[0].hash() != policy.hash()


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path):
    """Whether it stops between two steps or in the middle of one, with the next batch half sampled."""
    made = config(tmp_path)
    whole = [tmp_path / "whole.jsonl", tmp_path / "half.jsonl"]
    policy, stats = through(made, whole[0], tmp_path / "whole")
    with pytest.raises(InterruptedError):
        through(made, whole[1], tmp_path / "half", Keeps(until=4))
    kept = checkpoint.latest(tmp_path / "half")
    assert kept.name == "checkpoint-2"
    waiting = checkpoint.load_rows(kept, "pending")
    assert {row["policy_version"] for row in waiting} == {1}
    resumed, again = through(made, whole[1], tmp_path / "half")
    assert resumed.hash() == policy.hash()
    assert again.rewards == stats.rewards
    assert whole[0].read_bytes() == whole[1].read_bytes()
    assert checkpoint.load_rows(tmp_path / "half" / "checkpoint-5", "pending") == []


class Fails(HFEngine):
    """Its third batch's second turn goes wrong."""

    calls = 0

    def generate(self, prompts, **settings):
        Fails.calls += 1
        if Fails.calls == 8:
            raise ZeroDivisionError("in the sampler")
        return super().generate(prompts, **settings)


def test_what_goes_wrong_in_the_thread_surfaces_with_its_traceback(tmp_path):
    track = Keeps()
    with pytest.raises(ZeroDivisionError, match="in the sampler") as caught:
        through(config(tmp_path), track=track, engine=Fails)
    assert 1 <= len(track.rows) <= 2  # in the very step
    shown = "".join(traceback.format_exception(caught.value))
    assert "Fails.calls == 8" in shown or "in generate" in shown
    assert "in play" in shown
    assert not [thread for thread in threading.enumerate() if thread.name == "drift-ahead"]


class Endless(HFEngine):
    """Its second batch never ends."""

    seen, interrupts = (), False

    def generate(self, prompts, **settings):
        if len(self.seen) >= 3:
            while True:
                if self.interrupts and _waits(threading.main_thread()):
                    Endless.interrupts = False
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                self.policy.model(input_ids=torch.tensor([[1, 2]]))
        Endless.seen += (len(prompts),)
        return super().generate(prompts, **settings)


def _waits(thread):
    """Whether it is in `Ahead.result`, waiting."""
    frame, names = sys._current_frames()[thread.ident], []
    while frame is not None:
        names.append(frame.f_code)
        frame = frame.f_back
    return names[0].co_name == "wait" and Ahead.result.__code__ in names


@pytest.fixture
def interruptible():
    """Python's own handler, which is not there in a process that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("where", ["accumulate", "waiting"])
def test_an_interrupt_leaves_no_thread(tmp_path, monkeypatch, where):
    """Ctrl-C while the policy trains, and while it waits for samples that never come."""
    Endless.seen, Endless.interrupts = (), where == "waiting"
    begun = time.monotonic()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    if where == "accumulate":
        monkeypatch.setattr(Branches, "accumulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        through(config(tmp_path), engine=Endless)
    assert time.monotonic() - begun < 60  # for ever, where the thread is waited for
    assert not [thread for thread in threading.enumerate() if thread.name == "drift-ahead"]


def test_calls_one_after_another():
    ahead, gate = Ahead(torch.device("cpu")), threading.Event()
    with pytest.raises(RuntimeError, match="no call was started"):
        ahead.result()
    ahead.start(gate.wait)
    ahead.check()
    with pytest.raises(RuntimeError, match="was not waited for"):
        ahead.start(gate.wait)
    gate.set()
    assert ahead.result() is True
    ahead.start(lambda: 1 // 0)
    ahead._thread.join()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            ahead.check()
    ahead.close()


def test_weights_stand_still_until_sync(tmp_path):
    """Also with LoRA, whose base is one in memory for both."""
    shape = Qwen2Config(vocab_size=len(TOKENIZER), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    shape.num_key_value_heads, shape.intermediate_size = 2, 24
    wrapped = get_peft_model(causal_lm(shape), LoraConfig(r=2, target_modules="all-linear"))
    for policy in (load_policy(config(tmp_path).model), Policy(wrapped, TOKENIZER)):
        still = Still(HFEngine(policy), policy, threading.Event())
        prompts = [[20, 21, 22], [23, 24]]
        settings = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "seed": 0}
        before = HFEngine(policy).generate(prompts, **settings)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        after = HFEngine(policy).generate(prompts, **settings)
        assert before != after
        assert still.generate(prompts, **settings) == before
        still.sync()
        assert still.generate(prompts, **settings) == after
        assert still.policy.tokenizer is not policy.tokenizer
        pairs = list(zip(policy.model.parameters(), still.policy.model.parameters()))
        assert all((ours is theirs) == (not ours.requires_grad) for ours, theirs in pairs)
        still.stop.set()
        with pytest.raises(Stopped):
            still.generate(prompts, **settings)
        with pytest.raises(Stopped):
            still.policy.model(input_ids=torch.tensor([[1]]))
        assert HFEngine(policy).generate(prompts, **settings) == after


def test_engines_with_weights_of_their_own_are_synced_before_each_step(tmp_path):
    """The server's part is played by a copy that takes the policy's weights over when it is told, and only then."""
    synced = []

    class Server:
        def __init__(self, policy):
            self.live, self.inner = policy, HFEngine(load_policy(config(tmp_path).model, seed=9))

        def sync(self):
            synced.append(threading.current_thread() is threading.main_thread())
            self.inner.policy.restore(self.live.state())

        def remembering(self):  # without it the last bits would be others
            return self.inner.remembering()

        def generate(self, prompts, **settings):
            return self.inner.generate(prompts, **settings)

    for ahead in (0, 1):
        synced.clear()
        made = config(tmp_path, ahead=ahead)
        policy, _ = through(made, engine=Server)
        assert policy.hash() == through(made)[0].hash()
        assert synced == [True] * made.online.steps


def single_token_samples(policy, stale, advantages):
    """Every token of the vocabulary as the one-token answer to one prompt, weighted by how likely `stale` says it."""
    prompt = chat.render(policy.tokenizer, [{"role": "user", "content": "q"}], True)
    with torch.no_grad():
        behind = stale.model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
    samples = []
    for token, value in enumerate(advantages):
        ids, logprobs = [*prompt, token], [0.0] * len(prompt) + [float(behind[token])]
        turns = [Turn(len(prompt), len(prompt) + 1)]
        made = Trajectory("p", ids, turns, index=token, advantage=float(value), logprobs=logprobs)
        samples.append(Sample(made, [], 0, 0.0, [], 0, policy=float(behind[token].exp())))
    return prompt, behind, samples


def test_stale_samples_give_the_gradient_of_fresh_ones(tmp_path):
    """E_μ of the loss's gradient, over all answers, is that of −E_π[A]: what another policy sampled counts π/μ times."""
    made = config(tmp_path, algorithm="grpo", curriculum={})
    policy, stale = load_policy(made.model, seed=0), load_policy(made.model, seed=0)
    with torch.no_grad():
        for parameter in stale.model.parameters():
            parameter.add_(3e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    draw = torch.Generator().manual_seed(2)
    advantages = torch.randn(len(policy.tokenizer), generator=draw, dtype=torch.float64)
    prompt, behind, samples = single_token_samples(policy, stale, advantages)
    optimizer = MasterAdamW(policy.model, made.train)
    branches = Branches(policy, optimizer, made, ALGORITHMS["grpo"], StepMean(), StepMean())
    branches.accumulate(samples, Phase("both", 1.0), None, Denominators(1, 1))
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    optimizer.zero()

    def gradient(weights):
        """Of −Σ weights·A·log π."""
        logp = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        policy.model.zero_grad()
        (-(weights(logp).detach() * advantages * logp).sum()).backward()
        return {name: p.grad.clone() for name, p in policy.model.named_parameters()}

    fresh = gradient(lambda logp: logp.exp())
    with torch.no_grad():
        now = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
    ratio = (now - behind).exp()
    assert 1.05 < float(ratio.max()) < 2  # nothing is truncated
    for name, expected in fresh.items():
        torch.testing.assert_close(found[name], expected, rtol=2e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    uncorrected = gradient(lambda logp: behind.exp())
    apart = sum(float((uncorrected[name] - fresh[name]).norm() ** 2) for name in fresh) ** 0.5
    close = sum(float((found[name] - fresh[name]).norm() ** 2) for name in fresh) ** 0.5
    assert close < 1e-2 * apart


def test_the_divergence_is_corrected_for_the_sampler_whenever_it_told_its_log_probs(tmp_path):
    """min(exp(logp − sampler's), sampler_clip) a token, whether or not samples are ahead."""
    for ahead in (0, 1):
        for clip, expected in ((1.5, [0.7408, 1.5, 1.0, 1.0]), (None, None)):
            made = config(tmp_path, ahead=ahead, sampler_clip=clip)
            policy = load_policy(made.model, seed=0)
            optimizer = MasterAdamW(policy.model, made.train)
            branches = Branches(policy, optimizer, made, ALGORITHMS["drift"], StepMean(), StepMean())
            batch = type("B", (), {"rollout_logprobs": torch.tensor([-1.0, -2.0, -0.5, 0.0])})
            factor = branches._sampled_by(batch, torch.tensor([-1.3, -1.0, -0.5, 0.0]))
            assert factor == 1.0 if expected is None else factor.tolist() == pytest.approx(expected, abs=1e-4)
            assert (branches.spec.correction is None) == (clip is None)


def test_settings(tmp_path):
    assert config(tmp_path, ahead=0).online.ahead == 0
    with pytest.raises(ValueError, match=r"online\.ahead"):
        config(tmp_path, ahead=2)
    made = config(tmp_path)
    with pytest.raises(InterruptedError):
        through(made, folder=tmp_path / "c", track=Keeps(until=3))
    with pytest.raises(checkpoint.CheckpointError, match="online was"):
        through(config(tmp_path, ahead=0), folder=tmp_path / "c")
    state = json.loads((tmp_path / "c" / "checkpoint-2" / "state.json").read_text())
    assert state["job"]["online"]["ahead"] == 1
