"""What the engine on a vLLM server refuses, in words: a server that lacks something, samples that no model makes."""

import math
from pathlib import Path

import pytest
from fake_vllm_server import StandIn
from peft import LoraConfig
from test_engines import HOW, PROMPTS, _quick, agree, as_pairs, opened, policy, server, shape
from tiny_policy import LORA, TOKENIZER, Policy, causal_lm

from drift.config import ConfigError, EngineConfig, parse
from drift.engines import EngineError, open_engine
from drift.engines.vllm import server_command

__all__ = ["_quick", "policy", "server"]  # fixtures


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ("completions", "Unexpected fields in the request: {'return_token_ids'}"),
        ("ids", "no token ids"),
        ("prompt ids", "no prompt ids"),
        ("same prompt", "other prompt ids than it was sent"),
        ("logprobs", "no log-prob for each token id"),
        ("n", "1 choices where n=2 were asked for"),
        ("rpc", "/collective_rpc: HTTP 404"),
        ("extension", "no attribute 'drift_state'"),
    ],
)
def test_a_server_that_lacks_something_is_refused_in_words(policy, lacks, words):
    with StandIn(causal_lm(shape()), lacks=[lacks]) as standing:
        with pytest.raises(EngineError) as failure, opened(policy, standing):
            pass
        text = str(failure.value)
        assert text.startswith(f"engine.url={standing.url}: it lacks what training needs")
        assert words in text
        command = server_command("MODEL", url=standing.url, cpu=True)
        assert command in text
        assert "VLLM_SERVER_DEV_MODE=1" in command
        assert "--worker-extension-cls drift.engines.vllm_worker.Weights" in command


def nonsense(**changes):
    """Of the last choice; a value for the first token of a list."""

    def spoil(choices):
        made = dict(choices[-1])
        for key, value in changes.items():
            if key == "logprob":
                made["logprobs"] = {"token_logprobs": [value, *made["logprobs"]["token_logprobs"][1:]]}
            elif key == "token":
                made["token_ids"] = [value, *made["token_ids"][1:]]
            else:
                made[key] = value
        return [*choices[:-1], made]

    return spoil


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (nonsense(logprob=math.nan), "log-probs [nan"),
        (nonsense(logprob=-math.inf), "log-probs [-inf"),
        (nonsense(logprob=0.5), "log-probs [0.5"),
        (nonsense(logprob="a"), "finite and at most 0"),
        (nonsense(token=len(TOKENIZER)), f"each in [0, {len(TOKENIZER)})"),
        (nonsense(token=-1), "token ids [-1"),
        (nonsense(token="7"), "token ids ['7'"),
        (nonsense(token_ids=[], logprobs={"token_logprobs": []}), "one at least"),
        (nonsense(index=1), "should be there once"),
        (nonsense(index=None), "should be there once"),
        (lambda choices: choices[1:], "2 choices where n=3"),
        (lambda choices: [3, *choices[1:]], "should be there once"),
        (lambda choices: [{**choice, "logprobs": {"content": [3]}} for choice in choices], "no log-prob for each"),
    ],
)
def test_samples_that_no_model_makes_are_refused(policy, server, fault, words):
    with opened(policy, server) as engine:
        server.faults = [fault]
        with pytest.raises(EngineError) as failure:
            engine.generate([PROMPTS[0]] * 3, seed=3, **HOW)
    assert words in str(failure.value)


def test_log_probs_before_temperature_are_refused(policy):
    with (
        StandIn(causal_lm(shape()), raw=True) as standing,
        pytest.raises(EngineError, match="before temperature; --logprobs-mode processed_logprobs"),
        opened(policy, standing),
    ):
        pass


def test_another_vocabulary_is_refused(policy):
    with (
        StandIn(causal_lm(shape()), vocabulary=999) as standing,
        pytest.raises(EngineError, match=f"a vocabulary of 999, the policy one of {len(TOKENIZER)}"),
        opened(policy, standing),
    ):
        pass


def test_a_server_that_takes_no_adapters_is_refused():
    policy = Policy(shape(), lora=LoraConfig(**LORA))
    with (
        StandIn(causal_lm(shape()), lacks=["adapters"]) as standing,
        pytest.raises(EngineError, match=r"does not take adapters at run time[\s\S]*--enable-lora --max-lora-rank 8"),
        opened(policy, standing),
    ):
        pass


def test_a_server_that_is_not_there_is_refused_at_once(policy):
    config = EngineConfig(kind="vllm", url="http://127.0.0.1:9", wait=60.0)
    with pytest.raises(EngineError, match="nobody answers"), open_engine(config, policy, 8):
        pass


def test_a_proxy_is_taken_from_the_environment(policy, server, monkeypatch):
    config = EngineConfig(kind="vllm", url="http://there.invalid:8")
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(EngineError, match="lacks what training needs"), open_engine(config, policy, 8):
        pass
    assert server.calls[0][0] == "http://there.invalid:8/v1/models"
    monkeypatch.setenv("no_proxy", "there.invalid")
    with pytest.raises(EngineError, match="nobody answers"), open_engine(config, policy, 8):
        pass


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"engine": {"kind": "vllm"}, "rollout": {"top_p": 0.9}}, "rollout.top_p 0.9 with engine.kind 'vllm'"),
        ({"engine": {"url": "localhost:8000"}}, "engine.url"),
        ({"engine": {"concurrency": 0}}, "engine.concurrency"),
        ({"engine": {"retry": 1}}, "engine.retries"),
    ],
)
def test_settings_that_make_no_sense_are_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        parse({"name": "x", **section})


def test_the_documented_commands_are_the_ones_that_errors_name():
    text = (Path(__file__).parent.parent.parent / "docs" / "engines.md").read_text()
    assert f"    {server_command('runs/online-vllm/base', cpu=True)}\n" in text
    big = server_command("Qwen/Qwen2.5-3B-Instruct", dtype="bfloat16", lora_rank=16)
    assert f"    {big}\n" in text


def test_a_server_that_died_unnoticed_while_weights_are_compared_gets_them_again(policy, server):
    with opened(policy, server) as engine:
        whole = engine.generate(PROMPTS, seed=3, **HOW)
        server.boot()

        def dies(choices):
            server.boot()
            return choices

        server.faults = [dies]  # after the first of the probes that follow the handover: the others see first weights
        found = engine.generate(PROMPTS, seed=3, **HOW)
        assert as_pairs(found) == as_pairs(whole)
        agree(policy, PROMPTS, found)
