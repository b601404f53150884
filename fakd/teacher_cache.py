"""What a teacher makes of the training rows, stored once: it need not run again.

<folder>/rows-00000.safetensors   entries of many rows, one behind the other
         manifest.json            what they were made of, and the digest of every shard
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset

from .batch import run_model
from .capture import capture_hidden_states
from .config_file import ConfigError
from .data import lengths
from .files import digest, sync, write_whole
from .lm_head import body_of
from .outputs import top_entries

MANIFEST = "manifest.json"
_TOKENS_PER_SHARD = 1 << 20
_BYTES_PER_ENTRY = 8  # an int32 and a float32
_TOP_ENTRIES = ("teacher_indices", "teacher_logprobs")


@dataclass(frozen=True)
class Identity:
    """What a cache was made of; one of anything else is refused."""

    task: str
    teacher: str  # a hash of its weights
    tokenizer: str  # a hash
    data: str  # `Prepared.fingerprint`
    rows: int
    # Entries per token that a language model predicts; None stores none, of a classifier logits.
    top_k: int | None
    # Whose hidden states are stored, ascending, and in which dtype.
    layers: Sequence[int]
    dtype: str


def hash_weights(model: nn.Module) -> str:
    """A hash of all weights of a model, by name, at the speed of memory.

    Of each tensor: its dtype and shape, the exact sum of its bits, some of them, and where it ends.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        words = data[: len(data) // 8 * 8].view(np.int64)
        some = words[:: max(1, len(words) // 1024)]  # what moved within a tensor has the same sum
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)} {words.sum()}".encode())
        total.update(some.tobytes() + data[8 * len(words) :].tobytes())
    return total.hexdigest()[:16]


def size_bytes(rows: Dataset, identity: Identity, classes: int | None, width: int) -> int:
    """What a cache of these rows, and of a teacher so wide, takes on disk."""
    state = width * getattr(torch, identity.dtype).itemsize
    per_token = (identity.top_k or 0) * _BYTES_PER_ENTRY + len(identity.layers) * state
    per_row = (classes or 1) * 4 if identity.task == "classification" else 0
    return int(lengths(rows).sum()) * per_token + len(rows) * per_row


@torch.no_grad()
def write_cache(
    folder: Path,
    teacher: nn.Module,
    rows: Dataset,
    collator: Callable[[list[dict]], dict[str, Tensor]],
    identity: Identity,
    *,
    scores: Mapping[str, float],
    device: torch.device,
    console: Console,
    batch_rows: int = 16,
) -> None:
    """Store what a teacher predicts for all rows; one that was interrupted goes on.

    Args:
        folder: receives the shards, each whole or not at all, and the manifest last.
        teacher: a classifier or a causal language model, in eval mode, on `device`.
        rows: `Prepared.train`.
        collator: makes a batch of some.
        identity: see `Identity`.
        scores: of the teacher, kept for reports.
        device: of the teacher.
        console: where the progress goes.
        batch_rows: rows at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _plan_shards(lengths(rows).tolist())
    files = {}
    for number, (first, last) in enumerate(track(shards, "storing", console=console)):
        path = folder / f"rows-{number:05d}.safetensors"
        origin = {"identity": json.dumps(asdict(identity)), "rows": f"{first}:{last}"}
        if not _is_written(path, origin):
            parts = [
                _predict(
                    teacher,
                    rows,
                    range(start, min(last, start + batch_rows)),
                    collator,
                    identity,
                    device,
                )
                for start in range(first, last, batch_rows)
            ]
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            part = path.with_suffix(".part")
            save_file(tensors, part, metadata=origin)
            sync(part)
            os.replace(part, path)
        files[path.name] = {"first": first, "last": last, "digest": digest(path)}
    manifest = {"identity": asdict(identity), "scores": dict(scores), "files": files}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))


class TeacherCache:
    """What `write_cache` stored, read where it lies.

    Args:
        folder: see `write_cache`.

    Raises:
        ConfigError: no manifest, or a shard that is not the one it names.
    """

    def __init__(self, folder: Path) -> None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self.identity = Identity(**manifest["identity"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"teacher_cache must be a folder that fakd cache-teacher wrote to its end: got "
                f"{folder} ({type(error).__name__} in {MANIFEST}); run it again."
            ) from None
        self.scores: dict[str, float] = manifest["scores"]
        self._shards = []
        for name, file in manifest["files"].items():
            path = folder / name
            if not path.is_file() or digest(path) != file["digest"]:
                raise ConfigError(
                    f"teacher_cache must have {name} as it was written: got another one or none "
                    f"in {folder}; run fakd cache-teacher again."
                )
            self._shards.append((file["first"], file["last"], path))
        self._states: set[str] = set()
        self._open: dict[Path, tuple[object, list[int]]] = {}

    def check(self, expected: Identity) -> None:
        """Compare what the cache was made of with what the training has.

        Raises:
            ConfigError: naming all that differs.
        """
        ours, theirs = asdict(expected), asdict(self.identity)
        # One with more than is needed serves.
        if set(ours["layers"]) <= set(theirs["layers"]):
            ours["layers"] = theirs["layers"]
        if not ours["layers"]:
            ours["dtype"] = theirs["dtype"]
        self._states = {f"teacher_state_{layer}" for layer in expected.layers}
        changed = [
            f"{name}: {ours[name]}, was {theirs[name]}"
            for name in ours
            if ours[name] != theirs[name]
        ]
        if changed:
            raise ConfigError(
                "teacher_cache must be of this teacher, tokenizer and data: got another one, where "
                f"these differ: {'; '.join(changed)}; run fakd cache-teacher with these settings."
            )

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """What is stored of a row: "teacher_logits" [C], or [T, k] of indices and logprobs; and
        "teacher_state_<layer>" [T, D] of the layers that were checked for."""
        first, _, path = next(s for s in self._shards if s[0] <= row < s[1])
        if path not in self._open:
            file = safe_open(path, framework="pt")
            self._open[path] = file, [0, *file.get_tensor("tokens").cumsum(0).tolist()]
        file, ends = self._open[path]
        part, entries = slice(ends[row - first], ends[row - first + 1]), {}
        for name in file.keys():  # noqa: SIM118
            if name == "teacher_logits":
                entries[name] = file.get_slice(name)[row - first]
            elif name in self._states or name in _TOP_ENTRIES:
                entries[name] = file.get_slice(name)[part]
        return entries


class RowsWithTeacher(TorchDataset):
    """Rows, each with what a cache holds of it."""

    def __init__(self, rows: Dataset, cache: TeacherCache) -> None:
        self._rows, self._cache = rows, cache

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        return {**self._rows[index], **self._cache[index]}


def collate_with_teacher(
    collator: Callable[[list[dict]], dict[str, Tensor]],
) -> Callable[[list[dict]], dict[str, Tensor]]:
    """A collator of such rows: entries of tokens lie where the tokens do, unused indices are -1."""

    def collate(rows: Sequence[dict]) -> dict[str, Tensor]:
        names = [name for name in rows[0] if name.startswith("teacher_")]
        batch = collator([{k: v for k, v in row.items() if k not in names} for row in rows])
        mask = _token_mask(batch)
        for name in names:
            parts = [row[name] for row in rows]
            if name == "teacher_logits":
                batch[name] = torch.stack(parts)
                continue
            values = torch.cat(parts)
            fill = -1 if name == "teacher_indices" else 0
            batch[name] = values.new_full((*mask.shape, *values.shape[1:]), fill)
            batch[name][mask] = values
        return batch

    return collate


def _token_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """[B, T]: where tokens lie; packed blocks have no mask, and no padding."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def _plan_shards(tokens: list[int]) -> list[tuple[int, int]]:
    """First and last row of each shard."""
    shards, first, held = [], 0, 0
    for row, count in enumerate(tokens):
        held += count
        if held >= _TOKENS_PER_SHARD:
            shards.append((first, row + 1))
            first, held = row + 1, 0
    return shards + ([(first, len(tokens))] if first < len(tokens) else [])


def _predict(
    teacher: nn.Module,
    rows: Dataset,
    indices: range,
    collator: Callable,
    identity: Identity,
    device: torch.device,
) -> dict[str, Tensor]:
    """Entries of some rows, one behind the other; `tokens` says how many each has."""
    batch = send_to_device(collator([rows[index] for index in indices]), device)
    batch.pop("labels", None)
    is_lm = identity.task == "causal_lm"
    model = body_of(teacher) if is_lm else teacher
    layers = identity.layers
    with capture_hidden_states(teacher, layers) if layers else nullcontext({}) as states:
        output = run_model(model, batch, None, others=(teacher,))
    mask = _token_mask(batch)
    found = {"tokens": mask.sum(1)}
    if not is_lm:
        found["teacher_logits"] = output.logits.float()
    elif identity.top_k is not None:
        top = top_entries(teacher, output[0], identity.top_k)
        found["teacher_indices"] = top.indices[mask].int()
        found["teacher_logprobs"] = top.logprobs[mask]
    dtype = getattr(torch, identity.dtype)
    for layer, state in states.items():
        found[f"teacher_state_{layer}"] = state[mask].to(dtype)
    return {name: tensor.cpu() for name, tensor in found.items()}


def _is_written(path: Path, origin: Mapping[str, str]) -> bool:
    """Whether a shard of the same origin is there, whole: it got its name when it was."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() == dict(origin)
    except Exception:  # a file of somebody else
        return False
