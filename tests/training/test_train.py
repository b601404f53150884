"""The loop: it learns, it logs, it repeats itself exactly, and it stops at a broken loss."""

import copy
import io
import json
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from rich.console import Console
from safetensors.torch import load_file

from fakd import Distiller, TrainConfig
from fakd.train import NonFiniteLoss, train
from tests.support.models import tiny_batch, tiny_model


def make(**options) -> Distiller:
    teacher = tiny_model(layers=4, width=32, labels=3, seed=1)
    student = tiny_model(layers=2, width=16, labels=3, seed=2)
    torch.manual_seed(3)
    return Distiller(teacher, student, **options)


def batches(count: int) -> list[dict]:
    return [tiny_batch(8, labels=3, seed=index % 4) for index in range(count)]


def test_every_term_falls():
    log = train(make(), batches(60), TrainConfig(learning_rate=1e-2, log_every=10))
    for name in ("loss", "task", "cosine", "euclidean"):
        assert log[-1][name] < 0.8 * log[0][name], name


def test_log(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    log = train(make(task_weight=0.5), batches(7), TrainConfig(log_every=3), log_path=path)
    assert [line["step"] for line in log] == [3, 6, 7]
    assert [json.loads(line) for line in path.read_text().splitlines()] == log
    for line in log:
        terms = [line[f"weighted_{name}"] for name in ("task", "cosine", "euclidean")]
        assert line["loss"] == pytest.approx(sum(terms), rel=1e-5)
        assert line["weighted_task"] == pytest.approx(0.5 * line["task"])
        assert line["step_seconds"] > 0


def test_learning_rate_rises_then_falls():
    log = train(make(), batches(10), TrainConfig(learning_rate=1.0e-3, warmup=0.3, log_every=1))
    rates = [line["learning_rate"] for line in log]
    assert rates[0] == 0
    assert max(rates) == rates[3] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-3 / 7)


def test_same_seed_same_weights():
    first, second = make(), make()
    for distiller in (first, second):
        train(distiller, batches(4), TrainConfig(seed=5))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_step_is_the_plain_one():
    distiller, plain = make(), make()
    config = TrainConfig(learning_rate=1e-2, warmup=0.0, max_grad_norm=0.1, weight_decay=0.0)
    for module in (*distiller.modules(), *plain.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    log = train(distiller, batches(1), config)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    loss = plain.train()(**batches(1)[0]).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    optimizer.step()
    assert log[0]["loss"] == loss.item()
    for name, tensor in distiller.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_steps_without_a_label():
    """They teach what the teacher shows; the task term is 0, not NaN."""
    distiller, hidden = make(), batches(1)[0]
    hidden["labels"][:] = -100
    log = train(distiller, [hidden, hidden], TrainConfig(log_every=1))
    for line in log:
        assert line["task"] == 0
        assert line["loss"] == pytest.approx(line["weighted_cosine"] + line["weighted_euclidean"])
    weights = distiller.state_dict()
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.fixture
def bf16():
    """An accelerator whose arithmetic is bf16; accelerate keeps its settings for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_leaves_the_forward_pass_as_it_was(bf16):
    distiller, plain = make().eval(), make().eval()
    for module in (*distiller.modules(), *plain.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    # The warmup begins with a learning rate of 0.
    (line,) = train(distiller, batches(1), TrainConfig(warmup=1.0), accelerator=bf16)
    expected = plain(**batches(1)[0])
    assert line["loss"] != expected.loss.item()
    for name, value in expected.logs.items():
        assert line[name] == pytest.approx(value.item(), rel=0.05), name
    assert distiller(**batches(1)[0]).logits.dtype == torch.float32
    assert torch.equal(distiller.eval()(**batches(1)[0]).loss, expected.loss)


def test_trackers_and_bar_show_the_terms():
    lines = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory = "lines", False
        tracker = property(lambda self: self)

        def log(self, values, step=None, **_):
            lines.append({"step": step} | values)

    accelerator = Accelerator(log_with=Tracker(_blank=True))
    accelerator.init_trackers("terms")
    screen = io.StringIO()
    console = Console(file=screen, width=160, force_terminal=True)
    log = train(
        make(),
        batches(3),
        TrainConfig(log_every=2),
        accelerator=accelerator,
        console=console,
        title="student",
    )
    assert lines == log
    last = log[-1]
    terms = " + ".join(f"{n} {last[f'weighted_{n}']:.3f}" for n in ("cosine", "euclidean", "task"))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "3/3" in shown
    assert f"loss {last['loss']:.3f} = {terms}" in " ".join(shown.split())


def test_teacher_is_untouched():
    distiller = make()
    before = copy.deepcopy(distiller.teacher.state_dict())
    train(distiller, batches(3), TrainConfig(learning_rate=0.1))
    for name, tensor in distiller.teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_vectors_do_not_decay():
    distiller = make()
    with torch.no_grad():
        distiller.student.classifier.bias.fill_(1.0)
    before = copy.deepcopy(distiller.student.state_dict())
    # All weights 0 leave only the decay to move anything.
    distiller.task_weight = 0.0
    distiller.feature.cosine_weight = distiller.feature.euclidean_weight = 0.0
    config = TrainConfig(learning_rate=0.1, weight_decay=0.5, warmup=0.0)
    train(distiller, batches(3), config)
    after = distiller.student.state_dict()
    assert torch.equal(after["classifier.bias"], before["classifier.bias"])
    word = "bert.encoder.layer.0.output.dense.weight"
    assert after[word].norm() < 0.95 * before[word].norm()


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        ("features", r"got nan in step 2, from cosine and euclidean \(cosine = nan, .*task = "),
        ("task", r"got inf in step 2, from task \(cosine = "),
    ],
)
def test_broken_loss_names_its_term_and_spares_the_weights(broken, match, tmp_path):
    distiller, weights = make(), []

    def remember(_module, _args):
        weights.append(copy.deepcopy(distiller.student.state_dict()))

    def break_features(_module, _args, output):
        return output * float("nan") if len(weights) == 1 else output

    def break_task(_module, _args, output):
        if len(weights) == 2:
            output["loss"] = output["loss"] * float("inf")
        return output

    distiller.student.register_forward_pre_hook(remember)
    if broken == "features":
        distiller.teacher.bert.encoder.layer[-1].register_forward_hook(break_features)
    else:
        distiller.student.register_forward_hook(break_task)
    with pytest.raises(NonFiniteLoss, match=match):
        train(
            distiller,
            batches(4),
            TrainConfig(learning_rate=1e-2),
            log_path=tmp_path / "log.jsonl",
        )
    assert len(weights) == 2
    saved = load_file(tmp_path / "bad-batch-step-2.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in batches(2)[1].items())
    for name, tensor in distiller.student.state_dict().items():
        assert torch.equal(tensor, weights[1][name]), name


def test_nothing_to_train_on():
    with pytest.raises(ValueError, match="batches must hold at least one step"):
        train(make(), [], TrainConfig())
    with pytest.raises(ValueError, match="whole steps of 2 micro-batches: got 3; drop the last 1"):
        train(make(), batches(3), TrainConfig(accumulation=2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be > 0: got 0.0"),
        ({"log_every": 0}, "log_every must be > 0: got 0"),
        ({"warmup": 1.5}, "warmup must be from 0 to 1: got 1.5"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0: got -1.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be > 0: got nan"),
    ],
)
def test_impossible_settings(options, match):
    with pytest.raises(ValueError, match=match):
        TrainConfig(**options)
