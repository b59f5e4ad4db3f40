"""Settings: what is accepted, what is refused, and whether the complaint helps."""

import pytest
import yaml

from drift.config import Config, ConfigError, TrainConfig, dump, load, parse


def config(tmp_path, text="name: q\n", *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, list(overrides))


def complaint(tmp_path, *overrides, text="name: q\n"):
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, text, *overrides)
    return str(caught.value)


def test_defaults_are_the_published_ones(tmp_path):
    read = config(tmp_path)
    assert (read.weights.gamma, read.weights.beta, read.weights.repetition) == (0.9, 0.1, 0.5)
    assert (read.rollout.n, read.rollout.turns, read.rollout.max_new_tokens, read.rollout.format_penalty) == (
        16,
        5,
        512,
        -0.1,
    )
    assert (read.train.lr, read.train.warmup_ratio, read.train.batch_size, read.train.turns) == (5e-6, 0.1, 128, "last")


def test_the_online_method_has_its_own_optimizer(tmp_path):
    """Published learning rate, warm-up in steps and weight decay, unless the file says otherwise; they survive a dump."""
    read = config(tmp_path, "name: q\nonline: {}\n")
    assert (
        read.train.lr,
        read.train.warmup_steps,
        read.train.weight_decay,
        read.train.schedule,
        read.train.grad_clip,
    ) == (
        1e-5,
        10,
        0.01,
        "constant",
        1.0,
    )
    assert config(tmp_path, dump(read)) == read
    given = config(tmp_path, "name: q\nonline: {}\n", "train.lr=1e-3", "train.warmup_ratio=0.5")
    assert (given.train.lr, given.train.warmup_steps, given.train.warmup_ratio) == (1e-3, None, 0.5)
    off = config(tmp_path, "name: q\nonline: {teacher: {feedback: off}}\n")
    assert off.online.teacher.feedback == "off"
    assert config(tmp_path).train.warmup_steps is None


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.lr=1e-4", lambda c: c.train.lr == 1e-4),
        ("train.lr=1E+1", lambda c: c.train.lr == 10.0),
        ("train.lr=.5e-3", lambda c: c.train.lr == 5e-4),
        ("train.lr=1", lambda c: c.train.lr == 1.0 and isinstance(c.train.lr, float)),
        ("seeds=[3, 1]", lambda c: c.seeds == [3, 1]),
        ("arms=[drift]", lambda c: c.arms == ["drift"]),
        ("train.betas=[0.8, 0.95]", lambda c: c.train.betas == (0.8, 0.95)),
        ("track.sinks=[wandb, tensorboard]", lambda c: c.track.sinks == ["wandb", "tensorboard"]),
        ("task.options.max_terms=2", lambda c: c.task.options == {"max_terms": 2}),
        ("model.lora={rank: 8, alpha: 16}", lambda c: c.model.lora.rank == 8 and c.model.lora.alpha == 16.0),
        ("weights.skip_unsolved_groups=true", lambda c: c.weights.skip_unsolved_groups is True),
        ("output_dir=a=b", lambda c: c.output_dir == "a=b"),
    ],
)
def test_override(tmp_path, override, read):
    assert read(config(tmp_path, "name: q\n", override))


def test_overrides_go_over_the_file_and_over_each_other(tmp_path):
    read = config(
        tmp_path,
        "name: q\ntrain: {lr: 0.5, epochs: 3}\n",
        "train.lr=0.25",
        "train.lr=0.125",
        "model.lora.rank=4",
        "model.lora.alpha=8",
    )
    assert (read.train.lr, read.train.epochs, read.model.lora.rank) == (0.125, 3.0, 4)


@pytest.mark.parametrize(
    ("override", "right"),
    [
        ("train.lrr=1", "train.lr"),
        ("rollout.temprature=1", "rollout.temperature"),
        ("trian.lr=1", "train.lr"),
        ("traim=1", "train"),
        ("lr=1", "warm_start.lr or train.lr"),
        ("train.beta=0.1", "train.betas"),
        ("rollout.beta=0.1", "weights.beta"),
        ("model.target_modules=x", "model.lora.target_modules"),
        ("model.lora.rang=4", "model.lora.rank"),
        ("train.seeds=[1]", "seeds"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path, override, right):
    key = override.split("=")[0]
    assert complaint(tmp_path, override) == f"{key}: no such setting; did you mean {right}?"


def test_unknown_key_always_names_something(tmp_path):
    assert "did you mean" in complaint(tmp_path, "zzzzzz.qqqqq=1")


def test_unknown_key_like_no_other_gets_the_section_s(tmp_path):
    said = complaint(tmp_path, "train.learning_rate=1e-4")
    assert said == f"train.learning_rate: no such setting; train knows {', '.join(TrainConfig.model_fields)}"
    assert complaint(tmp_path, "xyzzy=1").startswith("xyzzy: no such setting; the file knows name, output_dir, seeds")


def test_every_unknown_key_is_named(tmp_path):
    assert complaint(tmp_path, text="name: q\ntrain: {lrr: 1, epoch: 2}\nevil: {turn: 3}\n").splitlines() == [
        "train.lrr: no such setting; did you mean train.lr?",
        "train.epoch: no such setting; did you mean train.epochs?",
        "evil.turn: no such setting; did you mean eval.turns?",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr=fast", "train.lr: 'fast' should be a valid number"),
        ("train.lr='1e-4'", "train.lr: '1e-4' should be a valid number"),
        ("train.lr=0", "train.lr: 0 should be greater than 0"),
        ("train.lr=.inf", "train.lr: inf should be a finite number"),
        ("train.batch_size=2.5", "train.batch_size: 2.5 should be a valid integer"),
        ("train.batch_size=true", "train.batch_size: True should be a valid integer"),
        ("train.turns=first", "train.turns: 'first' should be 'last' or 'assistant'"),
        ("train.preset=exakt", "train.preset: 'exakt' should be 'exact' or null"),
        ("train.workspace_bytes=0", "train.workspace_bytes: 0 should be greater than or equal to 1 or null"),
        ("train.betas=[0.9, 1.0]", "train.betas[1]: 1.0 should be less than 1"),
        ("train=3", "train: 3 should be a mapping of keys to values, or left out"),
        ("train=", "train: None should be a mapping of keys to values, or left out"),
        ("weights.beta=0", "weights.beta: 0 should be greater than 0"),
        ("weights.beta=-1", "weights.beta: -1 should be greater than 0"),
        ("weights.gamma=1.5", "weights.gamma: 1.5 should be less than or equal to 1"),
        ("weights.min_weight=-1", "weights.min_weight: -1 should be greater than or equal to 0"),
        ("rollout.turns=0", "rollout.turns: 0 should be greater than or equal to 1"),
        ("rollout.temperature=0", "rollout.temperature: 0 should be greater than or equal to 0.001"),
        ("rollout.temperature=1e-300", "rollout.temperature: 1e-300 should be greater than or equal to 0.001"),
        ("train.epochs=1e300", "train.epochs: 1e+300 should be less than or equal to 1000000"),
        ("train.lr=90", "train.lr: 90 should be less than or equal to 10"),
        ("rollout.top_p=1.1", "rollout.top_p: 1.1 should be less than or equal to 1"),
        ("rollout.format_penalty=0.1", "rollout.format_penalty: 0.1 should be less than or equal to 0"),
        ("warm_start.target_low=0.6", "warm_start: target_low 0.6 should be below target_high 0.5"),
        ("seeds=[]", "seeds: [] should have at least 1 item"),
        ("seeds=[a]", "seeds[0]: 'a' should be a valid integer"),
        ("seeds=[1, 1]", "seeds [1, 1] should not name one twice"),
        ("model.heads=5", "model: hidden_size 96 should be a multiple of heads 5"),
        ("model.lora.rank=8", "model.lora.alpha: is missing; add it to the file, or give model.lora.alpha=…"),
        ("task.kind=jsonl", "task: path should name the JSONL file, since kind is jsonl"),
        ("name=a/b", "name: 'a/b' should be letters, digits, '_', '-' and '.', since it names a folder"),
        ("name=..", "name: '..' should be letters, digits, '_', '-' and '.', since it names a folder"),
    ],
)
def test_bad_value_says_what_would_do(tmp_path, override, said):
    assert complaint(tmp_path, override) == said


@pytest.mark.parametrize("text", ["1:30", "-1:30", "1:30.5", "010", "0_10", "190:20:30"])
def test_numbers_of_yaml_1_1_alone_are_refused(tmp_path, text):
    for said in (complaint(tmp_path, f"train.lr={text}"), complaint(tmp_path, text=f"name: q\nseeds: [{text}]\n")):
        assert f"{text} is no decimal number; write it as one" in said
    assert config(tmp_path, f"name: q\noutput_dir: '{text}'\n").output_dir == text


def test_other_numbers_are_read_as_they_look(tmp_path):
    read = config(tmp_path, "name: q\n", "seeds=[0, 1_000, 0x10]", "train.lr=0.01", "train.epochs=1e6")
    assert (read.seeds, read.train.lr, read.train.epochs) == ([0, 1000, 16], 0.01, 1e6)


def test_only_the_embedded_model_is_warm_started(tmp_path):
    assert config(tmp_path).warm_start.enabled
    assert config(tmp_path, "name: q\n", "model.path=null").warm_start.enabled
    given = config(tmp_path, "name: q\nwarm_start: {target_low: 0.2}\n", "model.path=m")
    assert (given.warm_start.enabled, given.warm_start.target_low) == (False, 0.2)
    assert parse(yaml.safe_load(dump(given))) == given
    said = complaint(tmp_path, "model.path=m", "warm_start.enabled=true")
    assert said.startswith("warm_start.enabled is true and model.path 'm'")
    assert "leave one of them out" in said


def test_path_is_refused_where_nothing_reads_it(tmp_path):
    assert "only the kinds jsonl, parquet, dataset read" in complaint(tmp_path, "task.path=a.jsonl")
    assert config(tmp_path, "name: q\n", "task.path=a.jsonl", "task.kind=jsonl").task.path == "a.jsonl"


@pytest.mark.parametrize("override", ["train.lr", "=1", "train..lr=1", ".lr=1"])
def test_malformed_override(tmp_path, override):
    assert "should read section.key=value" in complaint(tmp_path, override)


def test_override_under_a_value(tmp_path):
    said = complaint(tmp_path, "train.lr.x=1", text="name: q\ntrain: {lr: 0.5}\n")
    assert said == "override 'train.lr.x=1': train.lr is 0.5, which has no keys"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "name: is missing; add it to the file, or give name=…"),
        ("- 1\n", "is not a mapping"),
        ("name: q\nname: r\n", "'name' is given twice"),
        ("name: q\ntrain:\n  lr: 1\n  lr: 2\n", "'lr' is given twice"),
        ("name: [q\n", "not valid YAML"),
        ("name: q\n? [a]\n: b\n", "not valid YAML"),
        ("name: q\nseeds: [!!int abc]\n", "not valid YAML"),
        ("name: q\nseeds: !!int [1]\n", "not valid YAML"),
        ("name: q\ntrain: {lr: !!float abc}\n", "not valid YAML"),
        ("name: 2020-99-99\n", "not valid YAML"),
        ("name: " + 5000 * "[", "not valid YAML"),
        ("name: q\ntask: {seed: 99999999999999999999}\n", "task.seed: 99999999999999999999 should be less than"),
    ],
)
def test_bad_file(tmp_path, text, said):
    assert said in complaint(tmp_path, text=text)


def test_files_of_other_encodings(tmp_path):
    path = tmp_path / "q.yaml"
    path.write_bytes("name: q\r\nseeds: [3]\r\n".encode("utf-8-sig"))
    assert load(path).seeds == [3]
    path.write_bytes("name: q\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"q\.yaml: not UTF-8"):
        load(path)


def test_preset_exact(tmp_path):
    train = config(tmp_path, "name: q\n", "train.preset=exact").train
    assert (train.turns, train.token_reduction, train.normalize) == ("assistant", "sum", "weights")
    assert TrainConfig(preset="exact").turns == "assistant"
    said = complaint(tmp_path, "train.preset=exact", "train.turns=last")
    assert said == "train: turns 'last' contradicts preset exact, which sets it to 'assistant'; drop one"


def test_dump_round_trips(tmp_path):
    overrides = [
        "train.preset=exact",
        "train.lr=1e-5",
        "train.betas=[0.9, 0.95]",
        "model.lora={rank: 2, alpha: 3}",
        "seeds=[4, 5]",
    ]
    tricky = [
        "output_dir='1e-4'",
        "task.name='yes'",
        "task.answer_tag='null'",
        "task.options={a: [1, x], b: 1.0e-7, c: 'Größe'}",
    ]
    for chosen in ([], overrides, tricky, overrides + tricky):
        first = config(tmp_path, "name: q\n", *chosen)
        assert config(tmp_path, dump(first)) == first
        assert parse(yaml.safe_load(dump(config(tmp_path)))) == config(tmp_path)


def test_config_is_frozen(tmp_path):
    read = config(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        read.train.lr = 1.0
    assert Config(name="a").seeds is not Config(name="b").seeds
