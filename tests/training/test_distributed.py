"""However the rows of a step are split, over processes and in time, its gradients are the same."""

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from fakd import DistillConfig, Distiller, FeatureAlignmentLoss, TrainConfig
from fakd.distribute import join, prepare, shard, unsharded
from fakd.train import NonFiniteLoss, train
from tests.support.models import tiny_batch, tiny_model
from tests.training.test_lm_head import SIZES, causal_lm

PROCESSES, ROWS = 2, 8
KINDS = ("ddp", "fsdp")
ALL_TERMS = DistillConfig(alpha=0.7, beta=0.3, gamma=0.2, delta=0.1, temperature=2.0, heads="mean")


def language_models(is_tied: bool) -> Distiller:
    sizes = SIZES | {"hidden_size": 24, "num_attention_heads": 3}
    config = AutoConfig.for_model("llama", **sizes, tie_word_embeddings=is_tied)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    return Distiller.from_config(teacher, causal_lm("qwen3" if is_tied else "llama"), ALL_TERMS)


def classifiers(**options) -> Distiller:
    teacher = tiny_model(layers=4, width=32, labels=3, seed=1)
    student = tiny_model(layers=2, labels=3, seed=2)
    if not options:
        return Distiller.from_config(teacher, student, ALL_TERMS)
    return Distiller.from_config(teacher, student, DistillConfig(task_weight=0.0, **options))


def learned_weights() -> Distiller:
    teacher, student = (tiny_model(width=width, labels=3) for width in (32, 16))
    feature = FeatureAlignmentLoss(16, 32, 4, learn_weights=True, projection="shared")
    return Distiller(teacher, student, feature=feature)


CASES = {
    "language models, four terms": lambda: language_models(is_tied=False),
    "language models, tied heads": lambda: language_models(is_tied=True),
    "language model, labels alone": lambda: Distiller(None, causal_lm("gpt2")),
    "classifiers, four terms": classifiers,
    # Parameters that no term reaches: the head, and the last block's output.
    "features alone": lambda: classifiers(beta=1.0, delta=1.0, mapping=[(1, 2)]),
    "attention alone": lambda: classifiers(beta=0.0, delta=0.0, gamma=1.0, mapping="last"),
    "learned weights": learned_weights,
    "projections of another dtype": learned_weights,
}


def make(name: str) -> Distiller:
    """The same one in every process, in float64, without dropout."""
    torch.manual_seed(0)
    distiller = CASES[name]().double()
    if "another dtype" in name:
        distiller.feature.float()
    for module in distiller.student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = distiller.student.config
    for key in ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"):
        setattr(config, key, 0.0)
    return distiller


def rows_of(name: str) -> dict[str, torch.Tensor]:
    """Eight texts of 11 down to 4 tokens; the first four have fewer labels, the first two none."""
    batch = tiny_batch(ROWS, 11, labels=3)
    if "language" in name:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, 2:4] = -100
        batch["labels"][2] = -100
    batch["labels"][:2] = -100
    if "alone" in name and "labels" not in name:
        del batch["labels"]
    return batch


class Gradients:
    """In place of checkpoints: keeps the gradients that reach the optimizer."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def restore(self, _accelerator, distiller, optimizer, _schedule) -> int:
        def keep(*_):
            for name, parameter in distiller.named_parameters():
                grad = parameter.grad
                if grad is not None:
                    is_sharded = isinstance(grad, DTensor)
                    self.found[name] = grad.full_tensor() if is_sharded else grad.clone()

        optimizer.optimizer.register_step_pre_hook(keep)
        return 0

    def save(self, *_) -> None:
        pass


def gradients(name: str, kind: str, accumulation: int) -> tuple[dict, list]:
    """The gradients of one step over all rows, those of this process among them, and its log."""
    accelerator = join()
    distiller = make(name)
    if kind == "fsdp":
        shard(accelerator, distiller)
    rows = ROWS // accelerator.num_processes // accumulation
    first = accelerator.process_index * accumulation
    batches = [
        {key: value[part * rows : (part + 1) * rows] for key, value in rows_of(name).items()}
        for part in range(first, first + accumulation)
    ]
    config = TrainConfig(max_grad_norm=1e9, accumulation=accumulation)
    kept = Gradients()
    log = train(distiller, batches, config, accelerator=accelerator, checkpoints=kept)
    return kept.found, log


def check_same(found: tuple[dict, list], expected: tuple[dict, list]) -> None:
    """Each gradient to 1e-5 of its norm, or of nothing where it is nothing but roundoff."""
    (found, log), (expected, expected_log) = found, expected
    assert found.keys() == expected.keys()
    largest = max(float(grad.norm()) for grad in expected.values())
    for name, grad in expected.items():
        error = float((found[name] - grad).norm())
        assert error <= 1e-5 * float(grad.norm()) + 1e-12 * largest, (name, error)
    (line,), (expected_line,) = log, expected_log
    assert line.keys() == expected_line.keys()
    for name in line.keys() - {"step_seconds"}:
        assert line[name] == pytest.approx(expected_line[name], rel=1e-5), name


def stop(kind: str, folder: Path) -> tuple[str, bool]:
    """What process 0 hears when features of process 1 are NaN, and whether no weight has moved."""
    accelerator = join()
    distiller = make("classifiers, four terms")
    if kind == "fsdp":
        shard(accelerator, distiller)
    if accelerator.process_index == 1:
        distiller.teacher.bert.encoder.layer[-1].register_forward_hook(lambda *a: a[-1] * torch.nan)
    before = copy.deepcopy(get_model_state_dict(distiller))
    own = slice(4 * accelerator.process_index, 4 * accelerator.process_index + 4)
    batches = [{key: value[own] for key, value in rows_of("").items()}] * 2
    options = {"accelerator": accelerator, "log_path": folder / kind / "log.jsonl"}
    with pytest.raises(NonFiniteLoss) as error:
        train(distiller, batches, TrainConfig(warmup=0.0), **options)
    after = get_model_state_dict(distiller)
    return str(error.value), all(torch.equal(before[name], after[name]) for name in before)


def log_and_logits(kind: str, folder: Path) -> tuple[list, torch.Tensor, torch.Tensor]:
    """The log, logits of the trained student where it is, and those of a whole copy of it."""
    accelerator = join()
    name = "classifiers, four terms"
    distiller, whole = make(name), make(name)
    if kind == "fsdp":
        shard(accelerator, distiller)
    # The same rows in all processes: the means are those of one.
    batches = [rows_of(name)] * 3
    options = {"accelerator": accelerator, "log_path": folder / f"{kind}.jsonl"}
    log = train(distiller, batches, TrainConfig(learning_rate=0.1, log_every=2), **options)
    whole.load_state_dict(
        get_model_state_dict(distiller, options=StateDictOptions(full_state_dict=True))
    )
    inputs = {key: value for key, value in batches[0].items() if key != "labels"}
    with torch.no_grad(), unsharded(distiller):
        logits = distiller.student.eval()(**inputs).logits
    return log, logits, whole.student.eval()(**inputs).logits.detach()


def unequal() -> str:
    """What a process hears when the other has another number of micro-batches."""
    accelerator = join()
    name = "features alone"
    batches = [rows_of(name)] * (1 + accelerator.process_index)
    with pytest.raises(ValueError, match="equally many") as error:
        train(make(name), batches, TrainConfig(), accelerator=accelerator)
    return str(error.value)


def one_process(process: int, folder: Path) -> None:
    """What each of the processes does; what it finds goes into a file."""
    torch.set_num_threads(1)
    # What torchrun sets; the processes meet in a file, and the port is not used.
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(process))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(PROCESSES))
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=process, world_size=PROCESSES
    )
    results = {
        (name, kind, accumulation): gradients(name, kind, accumulation)
        for name in CASES
        for kind in KINDS
        for accumulation in (1, 2)
    }
    results |= {("stop", kind): stop(kind, folder) for kind in KINDS}
    results |= {("log", kind): log_and_logits(kind, folder) for kind in KINDS}
    results["unequal"] = unequal()
    torch.save(results, folder / f"results-{process}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def _accelerator_on_the_cpu():
    """Accelerate keeps the device of the first accelerator for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes wrote: one start serves all tests."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(one_process, (folder,), nprocs=PROCESSES)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> list[dict]:
    """Of each process, everything it found."""
    return [torch.load(folder / f"results-{process}.pt") for process in range(PROCESSES)]


@pytest.mark.parametrize("name", CASES)
def test_accumulation(name):
    whole = gradients(name, "one", 1)
    check_same(gradients(name, "one", 2), whole)
    check_same(gradients(name, "one", 4), whole)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(name, kind, results):
    whole = gradients(name, "one", 1)
    for found in results:
        for accumulation in (1, 2):
            check_same(found[name, kind, accumulation], whole)


@pytest.mark.parametrize("kind", KINDS)
def test_all_stop_at_a_broken_loss(kind, folder, results):
    (message, is_untouched), (other_message, _) = (found["stop", kind] for found in results)
    assert message == other_message
    assert "in step 1, from soft and cosine and euclidean (soft = nan, " in message
    assert is_untouched
    saved = load_file(folder / kind / "bad-batch-step-1.safetensors")
    assert message.endswith(f"saved to {folder / kind / 'bad-batch-step-1.safetensors'}.")
    assert torch.equal(saved["input_ids"], rows_of("")["input_ids"][4:])


@pytest.mark.parametrize("kind", KINDS)
def test_one_log_of_all(kind, folder, results):
    (log, *_), (other_log, *_) = (found["log", kind] for found in results)
    assert [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()] == log
    assert [line["step"] for line in log] == [2, 3]
    assert [line["loss"] for line in other_log] == [line["loss"] for line in log]


def test_clipped_and_trained_like_one_process(results, tmp_path):
    expected_log, _, expected = log_and_logits("one", tmp_path)
    for kind in KINDS:
        for found in results:
            log, logits, whole_logits = found["log", kind]
            assert log[-1]["loss"] == pytest.approx(expected_log[-1]["loss"], rel=1e-5)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(logits, whole_logits)


def test_unequal_numbers_of_batches_stop_all(results):
    for found in results:
        assert found["unequal"] == (
            "batches must be equally many in every process: got [1, 2]; split them evenly."
        )


@pytest.mark.parametrize(
    ("kind", "name"), [("FSDP", "FSDP1"), ("DEEPSPEED", "DEEPSPEED"), ("MEGATRON_LM", "MEGATRON")]
)
def test_other_engines_are_refused(kind, name):
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=False)
    with pytest.raises(ValueError, match=f"must run one process, DDP or FSDP2: got {name}"):
        prepare(accelerator, make("learned weights"))


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    accelerator = join()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="must join the 2 processes that were started: got 1;"):
        prepare(accelerator, make("learned weights"))
