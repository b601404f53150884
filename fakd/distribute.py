"""One distiller over several processes: replicated (DDP) or sharded (FSDP2).

Both average the gradients of the processes; the training loop wants their sum and multiplies its
loss by the number of processes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from .architectures import find_blocks

_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_OTHERS = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


def join(mixed_precision: str = "no", **options) -> Accelerator:
    """The accelerator of this process, with all others that torchrun or accelerate has started.

    Equivalent to `Accelerator(...)`, which on machines without an accelerator leaves every process
    alone unless it is told that CPUs are meant.

    Args:
        mixed_precision: "no" | "bf16" | "fp16".
        **options: of `Accelerator`.
    """
    is_cpu = not torch.accelerator.is_available()
    return Accelerator(cpu=is_cpu, mixed_precision=mixed_precision, **options)


def is_main_process() -> bool:
    """Whether this process is the one that speaks, before any accelerator is there."""
    return int(os.environ.get("RANK", 0)) == 0


def start_anew() -> None:
    """Let the next accelerator of this process differ in precision; those before are of no use."""
    AcceleratorState._reset_state()


def leave() -> None:
    """Part from the other processes, at the end of everything."""
    PartialState().destroy_process_group()


def prepare(accelerator: Accelerator, distiller: nn.Module) -> nn.Module:
    """Place a distiller and its teacher on this process's device, and join the processes.

    Args:
        accelerator: says how: one process, DDP, or FSDP2 (its plugin with `fsdp_version=2`).
        distiller: a `Distiller`; one that `shard` has sharded stays as it is.

    Returns:
        What to call in its place; it has the same parameters. Make the optimizer from these.

    Raises:
        ValueError: DeepSpeed, Megatron, XLA or FSDP1; several processes that do not know of each
            other.
    """
    kind = accelerator.distributed_type
    if kind in _OTHERS or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        received = "FSDP1" if kind == DistributedType.FSDP else kind.value
        raise ValueError(
            f"accelerator must run one process, DDP or FSDP2: got {received}; choose one of these "
            "(fsdp_version: 2 in accelerate's config)."
        )
    started = int(os.environ.get("WORLD_SIZE", accelerator.num_processes))
    if started != accelerator.num_processes:
        raise ValueError(
            f"accelerator must join the {started} processes that were started: got "
            f"{accelerator.num_processes}; make it with fakd.distribute.join()."
        )
    if accelerator.is_fsdp2 and not isinstance(distiller, FSDPModule):
        shard(accelerator, distiller)
    if isinstance(distiller, FSDPModule):
        return distiller
    if accelerator.ddp_handler is None:
        # A student may have parameters that no term reaches, such as a pooler.
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    return accelerator.prepare_model(distiller)


def shard(accelerator: Accelerator, distiller: nn.Module) -> None:
    """Split the student, the projections and the teacher over all processes, in place.

    Not left to accelerate, which knows neither the teacher nor where the blocks are, shards on
    accelerators only, and rounds losses to the dtype of the arithmetic. Of its plugin,
    `reshard_after_forward` and `cpu_offload` are used. All processes must hold the same weights.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    options = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=_DTYPES[accelerator.mixed_precision], reduce_dtype=torch.float32
        ),
        "offload_policy": getattr(plugin, "cpu_offload", None) or OffloadPolicy(),
    }
    reshard = getattr(plugin, "reshard_after_forward", True)
    path, teacher_path = distiller.block_paths
    blocks = find_blocks(distiller.student, path).modules
    # Backward gathers the weights of a block when the gradient of its output arrives. The last one
    # whose attention is aligned may have no other gradient than that of its queries and keys: it
    # keeps its weights.
    last = max((ours for ours, _ in distiller.attention_pairs), default=None)
    kept = None if last is None else blocks[last - 1]
    for block in dict.fromkeys(blocks):
        fully_shard(block, reshard_after_forward=reshard and block is not kept, **options)
    # A group has one dtype, and projections may have another than the student. Their weights are
    # also read after forward, for the log.
    for part in distiller.children():
        if part is not distiller.student and any(True for _ in part.parameters()):
            fully_shard(part, reshard_after_forward=False, **options)
    fully_shard(distiller, **options)  # embeddings, heads and norms
    teacher = distiller.teacher
    if teacher is not None and not isinstance(teacher, FSDPModule):  # it may be shared
        for block in dict.fromkeys(find_blocks(teacher, teacher_path).modules):
            fully_shard(block, reshard_after_forward=reshard, **options)
        fully_shard(teacher, **options)


@contextmanager
def gradient_sync(model: nn.Module, is_wanted: bool) -> Iterator[None]:
    """Whether the backward pass inside adds up gradients over the processes; the last one must."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_wanted)
        yield
    elif isinstance(model, DistributedDataParallel) and not is_wanted:
        with model.no_sync():
            yield
    else:
        yield


@contextmanager
def unsharded(module: nn.Module | None) -> Iterator[None]:
    """Whole weights outside the blocks of a module that is sharded; does nothing to others.

    Inside, parts of the module can be called by themselves: `distiller.student(...)` after a first
    forward pass of the distiller, which finds out what belongs together. A collective of all
    processes.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
