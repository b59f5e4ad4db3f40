"""The engine on several servers, with stand-ins for them: who gets work, and what becomes of the work of one that dies."""

import json
import threading
import time
from contextlib import ExitStack

import pytest
import torch
from fake_vllm_server import StandIn
from killed_runs import config_file
from test_engines import HOW, _quick, agree, perturb, policy, shape
from tiny_policy import causal_lm

from drift import cli, store
from drift.config import ConfigError, EngineConfig, dump, load, parse
from drift.engines import EngineError, batch, open_engine, vllm, vllm_server
from drift.model.policy import load_policy

__all__ = ["_quick", "policy"]  # fixtures
PROMPTS = [[5, 6 + i % 9, 7 + i // 9] for i in range(24)] + [[5, 6, 7]] * 3
REQUESTS = 24  # of those, since equal prompts go together


@pytest.fixture(autouse=True)
def _asked_again_soon(monkeypatch):
    monkeypatch.setattr(vllm_server, "AGAIN", 0.05)
    monkeypatch.setattr(batch, "POLL", 0.05)


@pytest.fixture
def servers():
    """Three, each with first weights of its own."""
    with ExitStack() as stack:
        made = []
        for seed in (1, 2, 3):
            torch.manual_seed(seed)
            model = causal_lm(shape())
            perturb(model, 0.1 * seed)
            made.append(stack.enter_context(StandIn(model)))
        yield made


def opened(policy, servers, told=None, **changes):
    settings = {"wait": 20.0, "retries": 2, "timeout": 20.0, "concurrency": 2, **changes}
    config = EngineConfig(kind="vllm", urls=[server.url for server in servers], **settings)
    return open_engine(config, policy, 8, None if told is None else lambda line, lost: told.append((line, lost)))


def alone(policy, server):
    """The samples that one server gives."""
    with opened(policy, [server]) as engine:
        return engine.generate(PROMPTS, seed=3, **HOW)


def asked(server):
    """Requests of a batch, without those that the engine compares log-probs on."""
    return [body for _, body in server.bodies if body["max_tokens"] == HOW["max_new_tokens"]]


def clear(servers):
    for server in servers:
        del server.bodies[:]


class Bar:
    seen = 0

    def advance(self, by):
        self.seen += by


def test_several_servers_give_the_samples_of_one(policy, servers):
    expected = alone(policy, servers[0])
    agree(policy, PROMPTS, expected)
    servers[0].boot()
    clear(servers)
    told, bar = [], Bar()
    with opened(policy, servers, told) as engine:
        found = engine.generate(PROMPTS, seed=3, bar=bar, **HOW)
        assert engine.handovers == 3
        assert engine.gap < 1e-4
        assert engine.repeated == 0
    assert found == expected
    assert sum(len(asked(server)) for server in servers) == REQUESTS
    assert all(asked(server) for server in servers)
    assert {version for server in servers for version, body in server.bodies if body["max_tokens"] > 1} == {
        policy.hash()
    }
    assert max(server.most_in_flight for server in servers) == 2
    assert bar.seen == len(PROMPTS)
    assert told == []


def test_the_least_loaded_gets_the_next_request(policy, servers):
    gate = threading.Event()
    with opened(policy, servers, concurrency=4) as engine:
        clear(servers)
        servers[0].faults = [gate] * 4

        def open_gate(choices):
            gate.set()
            return choices

        servers[1].faults = [*[None] * 8, open_gate]
        engine.generate(PROMPTS, seed=3, **HOW)
    assert len(asked(servers[0])) <= 6  # four that waited, and what was left when they went on
    assert len(asked(servers[1])) >= 9
    clear(servers)
    with opened(policy, servers, concurrency=64) as engine:
        clear(servers)
        for server in servers:
            server.delay = 0.2
        engine.generate(PROMPTS[:6], seed=3, **HOW)
    assert [len(asked(server)) for server in servers] == [2, 2, 2]


def test_each_rank_begins_with_a_server_of_its_own(policy, servers, monkeypatch):
    for rank in range(4):
        monkeypatch.setattr(vllm, "_rank", lambda rank=rank: rank)
        with opened(policy, servers) as engine:
            clear(servers)
            engine.generate(PROMPTS[:1], seed=3, **HOW)
        assert [bool(asked(server)) for server in servers] == [place == rank % 3 for place in range(3)]


@pytest.mark.parametrize("after", [0, 3, 5])
def test_one_that_dies_gives_its_work_to_the_others(policy, servers, after):
    expected = alone(policy, servers[0])
    told, bar = [], Bar()
    with opened(policy, servers, told) as engine:
        clear(servers)
        servers[1].faults = [*[None] * after, "die"]
        for server in servers:
            server.delay = 0.02
        found = engine.generate(PROMPTS, seed=3, bar=bar, **HOW)
        assert engine.repeated == 0
        agree(policy, PROMPTS, found)
        assert found == expected
        assert bar.seen == len(PROMPTS)
        assert len(asked(servers[1])) >= after + 1
        assert len(asked(servers[0])) + len(asked(servers[2])) == REQUESTS  # all of its samples are others' now
        assert engine.generate(PROMPTS, seed=3, **HOW) == expected  # without it
    lines, lost = zip(*told)
    assert lost == (servers[1].url,)  # once
    assert lines[0].startswith(f"{servers[1].url} is set aside, and asked again every")
    assert "RemoteProtocolError" in lines[0]


def test_one_that_is_back_gets_the_weights_of_now_and_work(policy, servers):
    told = []
    with opened(policy, servers, told) as engine:
        servers[1].die()
        engine.generate(PROMPTS, seed=3, **HOW)
        perturb(policy.model)
        engine.sync()
        assert servers[0].version == servers[2].version == policy.hash() != servers[1].version
        servers[1].boot()
        clear(servers)
        servers[0].delay = servers[2].delay = 0.2
        found = engine.generate(PROMPTS, seed=3, **HOW)
        agree(policy, PROMPTS, found)
        assert asked(servers[1])
        assert all(version == policy.hash() for version, _ in servers[1].bodies)
    assert [lost for _, lost in told] == [servers[1].url, None]
    assert told[-1][0] == f"{servers[1].url} is back"
    assert found == alone(policy, servers[0])


def test_one_that_was_out_of_reach_with_older_weights_gives_no_sample_of_them(policy, servers):
    with opened(policy, servers) as engine:
        servers[1].die()
        engine.generate(PROMPTS, seed=3, **HOW)
        perturb(policy.model)
        engine.sync()
        servers[1].dead = False  # the same process, that holds the weights of before
        clear(servers)
        servers[0].delay = servers[2].delay = 0.2
        agree(policy, PROMPTS, engine.generate(PROMPTS, seed=3, **HOW))
        assert asked(servers[1])
        assert servers[1].version == policy.hash()


@pytest.mark.parametrize("noticed", [True, False])
def test_one_that_starts_anew_loses_its_own_samples_alone(policy, servers, noticed):
    expected = alone(policy, servers[0])
    with opened(policy, servers) as engine:
        clear(servers)

        def dies(choices):
            servers[1].boot()
            return choices

        servers[1].faults = [None, None, "restart" if noticed else dies]
        for server in servers:
            server.delay = 0.02
        before = engine.handovers
        assert engine.generate(PROMPTS, seed=3, **HOW) == expected
        assert engine.handovers == before + 1
        assert engine.repeated == 1
    assert len(asked(servers[0])) + len(asked(servers[2])) <= REQUESTS


@pytest.mark.parametrize("fault", [503, "abort"])
def test_one_that_fails_at_every_request_gives_them_to_the_others(policy, servers, fault):
    expected, told = alone(policy, servers[0]), []
    with opened(policy, servers, told, retries=1) as engine:
        servers[1].faults = [fault] * 4
        assert engine.generate(PROMPTS, seed=3, **HOW) == expected
    assert {lost for _, lost in told} == {servers[1].url, None} or [lost for _, lost in told] == [servers[1].url]
    assert "tried 2 times (engine.retries=1)" in told[0][0]


def test_a_request_at_which_all_fail_ends_the_batch(policy, servers):
    """Although each is used again before the last has failed."""

    def fails(body, fault, ordinary):
        if body["max_tokens"] == 1:  # of a comparison of log-probs
            return ordinary("", body, fault)
        time.sleep(0.4)
        return 503, {"error": {"message": "made up"}}

    with opened(policy, servers, told := [], retries=1) as engine:
        clear(servers)
        for server in servers:
            server.complete = lambda _, body, fault, ordinary=server.complete: fails(body, fault, ordinary)
        with pytest.raises(EngineError, match=r"HTTP 503: made up; it was tried 2 times"):
            engine.generate(PROMPTS[:1], seed=3, **HOW)
    assert sum(len(asked(server)) for server in servers) == 2 * 3
    assert any(lost is None for _, lost in told)


def test_all_dead_end_the_batch_once_they_were_waited_for(policy, servers):
    told = []
    with opened(policy, servers, told, wait=0.5) as engine:
        for server in servers:
            server.die()
        with pytest.raises(EngineError, match=r"waited for over engine.wait=0.5 s"):
            engine.generate(PROMPTS, seed=3, **HOW)
    assert len([lost for _, lost in told if lost]) == 2  # the last one is in the error


def test_the_first_that_is_back_goes_on_when_all_died(policy, servers):
    expected = alone(policy, servers[0])
    with opened(policy, servers, []) as engine:
        for server in servers:
            server.die()
        back = threading.Timer(0.5, servers[1].boot)
        back.start()
        assert engine.generate(PROMPTS, seed=3, **HOW) == expected
        back.join()
        assert [server.live for server in engine.servers] == [False, True, False]


def test_one_that_is_not_there_at_first_is_told_of_and_all_are_refused(policy, servers):
    told = []
    servers[0].die()
    with opened(policy, servers, told) as engine:
        clear(servers)
        agree(policy, PROMPTS, engine.generate(PROMPTS, seed=3, **HOW))
        assert told[0][1] == servers[0].url
        assert "nobody answers" in told[0][0]
        servers[0].boot()
        perturb(policy.model)
        while not engine.servers[0].live:
            engine.sync()
        for server in servers:
            server.delay = 0.05
        agree(policy, PROMPTS, engine.generate(PROMPTS, seed=3, **HOW))
        assert asked(servers[0])
    for server in servers:
        server.die()
    with pytest.raises(EngineError) as failure, opened(policy, servers, []):
        pass
    assert str(failure.value).startswith(f"engine.urls={servers[0].url}: nobody answers")
    assert "python -m vllm" in str(failure.value)


def test_one_that_cannot_be_used_is_refused_although_others_can(policy, servers):
    servers[1].lacks = {"ids"}
    with (
        pytest.raises(EngineError, match=rf"engine.urls={servers[1].url}: it lacks what training needs"),
        opened(policy, servers),
    ):
        pass
    servers[1].lacks = set()
    with opened(policy, servers) as engine:
        servers[2].deaf = True
        perturb(policy.model)
        with pytest.raises(EngineError, match=rf"engine.urls={servers[2].url}: .*differ from the policy's"):
            engine.sync()


# --- settings ---

KEY = "sk-secret"


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"url": "http://a:1", "urls": ["http://b:1"]}, r"url http://a:1 and urls \['http://b:1'\] both name servers"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "should not name one twice"),
        ({"urls": ["http://a:1", f"http://me:{KEY}@b:1"]}, r"engine\.urls: each must read http://HOST:PORT"),
        ({"urls": [f"http://me:{KEY}@b:1", 3]}, r"engine\.urls: each must read"),
        ({"urls": f"http://me:{KEY}@b:1"}, r"engine\.urls: must be a list"),
        ({"urls": {KEY: 1}}, r"engine\.urls: must be a list"),
        ({"url": [f"http://me:{KEY}@b:1"]}, r"engine\.url: must be one address; urls takes a list"),
        ({"url": 3}, r"engine\.url: must read"),
    ],
)
def test_addresses_that_are_refused(engine, words):
    with pytest.raises(ConfigError, match=words) as error:
        parse({"name": "x", "engine": engine})
    assert KEY not in str(error.value)


def test_url_and_urls_are_one_setting(tmp_path):
    for engine, addresses in (
        ({}, ["http://127.0.0.1:8000"]),
        ({"url": None}, ["http://127.0.0.1:8000"]),
        ({"url": "http://a:1/"}, ["http://a:1"]),
        ({"urls": ["http://a:1", "https://[::1]:2/"]}, ["http://a:1", "https://[::1]:2"]),
    ):
        config = parse({"name": "x", "engine": engine})
        assert config.engine.addresses == addresses
        path = tmp_path / "again.yaml"
        path.write_text(dump(config))
        assert load(path, []) == config
    path.write_text("name: x\n")
    assert load(path, ["engine.urls=[http://a:1, http://b:1]"]).engine.addresses == ["http://a:1", "http://b:1"]


# --- a run ---


def test_a_run_goes_on_without_one_and_its_summary_says_so(tmp_path, capfd):
    online = {"algorithm": "drift", "steps": 3, "prompts": 4, "curriculum": {"warmup_steps": 1}}
    engine = {"kind": "vllm", "wait": 20.0, "retries": 2, "timeout": 20.0}

    def model():
        served = load_policy(blank.model, seed=1).model
        served.set_attn_implementation("sdpa")
        return served

    blank = load(config_file(tmp_path, "online", engine=engine, online=online), [])
    with StandIn(model()) as one, StandIn(model()) as two:
        file = str(config_file(tmp_path, "online", engine=engine, online=online))
        assert cli.main(["run", file, f"engine.url={one.url}"]) == 0
        rows = {name: tmp_path / name / "seed-0" / "drift" / "rollouts.jsonl" for name in ("online", "two")}
        capfd.readouterr()
        two.faults = [*[None] * 20, "die"]
        assert cli.main(["run", file, "name=two", f"engine.urls=[{one.url},{two.url}]"]) == 0
        assert two.dead
        assert two.url in dump(load(tmp_path / "two" / "config.yaml", []))
    told = capfd.readouterr().err
    assert f"{two.url} is set aside" in told
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["lost_servers"].keys() == {two.url}
    assert told.count("is set aside") == summary["lost_servers"][two.url]  # once in each stage
    assert two.url in (tmp_path / "two" / "report.html").read_text()
    assert "lost_servers" not in json.loads((tmp_path / "online" / "summary.json").read_text())
    expected, found = (store.read(path) for path in rows.values())
    assert [row["token_ids"] for row in found] == [row["token_ids"] for row in expected]
    assert len({(row["prompt_id"], row["traj_idx"]) for row in found}) == len(found)
