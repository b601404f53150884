"""Settings from YAML and overrides: read, checked, written back."""

from pathlib import Path

import pytest

from fakd.config import RunConfig
from fakd.config_file import ConfigError, differences, fingerprint, load_config, to_yaml

WHOLE = """
task: classification
teacher: models/teacher
student: {layers: 3, width: 192}
data: {source: r8, max_tokens: 64}
output: outputs/run
steps: 100
distill: {mapping: last, gamma: 0.3}
train: {learning_rate: 1e-3, checkpoint_every: 50}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(WHOLE, encoding="utf-8")
    return path


def test_yaml_becomes_settings(file):
    config = load_config(file)
    assert config.student.layers == 3
    assert config.data.source == "r8"
    assert config.output == Path("outputs/run")
    assert config.train.learning_rate == 0.001
    assert config.distill.mapping == "last"
    assert config.distill.beta == 1.0  # a default


def test_overrides_win_over_the_file_and_the_last_over_those_before(file):
    settings = [
        "train.learning_rate=2e-4",
        "distill.mapping=[[1, 2], [3, 6]]",
        "steps=7",
        "steps=8",
    ]
    config = load_config(file, settings)
    assert config.train.learning_rate == 2e-4
    assert [tuple(pair) for pair in config.distill.mapping] == [(1, 2), (3, 6)]
    assert config.steps == 8


def test_overrides_alone_are_enough():
    config = load_config(
        None,
        [
            "task=causal_lm",
            "teacher=t",
            "student.layers=2",
            "data.source=x",
            "output=o",
            "epochs=1",
        ],
    )
    assert config.epochs == 1
    assert isinstance(config, RunConfig)


def test_all_settings_are_written_and_read_back(file, tmp_path):
    config = load_config(file)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(copy) == config
    assert "temperature: 1.0" in to_yaml(config)
    assert fingerprint(load_config(copy)) == fingerprint(config)


def test_differences_are_named(file):
    changed = load_config(file, ["train.seed=3", "student.layers=[1, 2]"])
    assert differences(changed, load_config(file)) == [
        "student.layers: [1, 2], was 3",
        "train.seed: 3, was 0",
    ]
    assert fingerprint(changed) != fingerprint(load_config(file))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.learning_rat=1", "got train.learning_rat; did you mean train.learning_rate"),
        ("studnet.layers=2", "got studnet; did you mean student"),
        ("distill.zeta=1", "got distill.zeta; did you mean distill.beta"),
        ("train.qqqq=1", "got train.qqqq; known: learning_rate, "),
        ("train.learning_rate=fast", "train.learning_rate: .*number.*got 'fast'"),
        ("steps=2.5", "steps: .*integer.*got 2.5"),
        ("train.warmup=2", "warmup must be from 0 to 1: got 2"),
        ("task=translation", "task must be one of 'classification', 'causal_lm'"),
        ("student.path=x", "student must have exactly one of path, config and layers"),
        ("epochs=3", "exactly one of steps and epochs"),
        ("teacher=null", "student.layers must come with a teacher"),
        ("steps", "a setting must be written name=value: got 'steps'"),
        ("steps=[1", "steps must be YAML: got .*line"),
        ("data=r8", "data: .*got 'r8'"),
        ("data.rows=0", "data.rows must be > 0: got 0"),
        ("data.layout=packed", "data.layout must be 'blocks' for classification"),
        ("steps=0", "^steps must be > 0: got 0; raise it.$"),
        ("train.seed=-1", "^seed must be from 0 to .*got -1"),
        ("distill.alpha=-1", "^alpha must be a finite number >= 0: got -1"),
        ("distill.temperature=0", "^temperature must be finite and > 0: got 0"),
        ("distill.top_k=0", "^top_k must be > 0: got 0"),
        ("distill.top_k=5", "^distill.top_k must be left out for classification.*got 5; drop it"),
        ("distill.mapping=unifrom", "^mapping must be .*got 'unifrom'; did you mean 'uniform'"),
        ("distill.mapping=last_k", "^mapping must be .*put the number in place of k"),
        (
            "distill.mapping=5",
            "^mapping must be the name of a preset, or pairs.*got 5; .*example.$",
        ),
        ("distill.mapping=[[1, -2]]", "^mapping must be the name of a preset, or pairs"),
        ("distill.mapping=[1, 2]", "^mapping must be the name of a preset, or pairs"),
        ("distill.attention_mapping=firs", "^attention_mapping must be .*got 'firs'; did you mean"),
        ("distill.output_distance=mse", "^output_distance must be one of .*got 'mse'"),
        ("distill.euclidean=square", "^euclidean must be one of .*got 'square'"),
        ("distill.projection=each", "^projection must be one of"),
        ("distill.init=random", "^init must be one of .*got 'random'"),
        ("distill.heads=all", "^heads must be one of .*got 'all'"),
        ("distill.heads=2", "^heads must be one of .*, or a list .*got 2; write"),
        ("distill.heads=[a]", "^heads must be one of .*, or a list .*got \\('a',\\); write"),
        ("student.layers=four", "^student.layers must be how many blocks .*got 'four'; write"),
        ("distill.schedules={alpha: fall}", "^schedules.alpha must be 'constant' where alpha is 0"),
    ],
)
def test_wrong_settings_are_named(file, setting, message):
    with pytest.raises(ConfigError, match=message):
        load_config(file, [setting])


def test_nothing_to_learn_from_is_an_error_of_settings(file):
    nothing = [f"distill.{name}=0" for name in ("task_weight", "beta", "gamma", "delta")]
    with pytest.raises(
        ConfigError, match=r"^one of the weights task_weight, .* must be > 0: got 0"
    ):
        load_config(file, nothing)
    alone = ["teacher=null", "student={path: x}", "distill.task_weight=0"]
    with pytest.raises(ConfigError, match=r"^distill.task_weight must be > 0 where labels alone"):
        load_config(file, alone)
    load_config(file, [*nothing[1:], "distill.schedules={beta: constant}"])


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="output must be given"):
        load_config(None, ["task=causal_lm", "steps=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b", "must hold names with values: got list"), ("a: [", "must be YAML: got ")],
)
def test_files_that_are_no_settings_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config must be a file that exists: got .*none\.yaml"):
        load_config(tmp_path / "none.yaml")
