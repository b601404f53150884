"""What every measuring process would do again, done once in the one they are forked from.

Imports take two seconds, three more where something is compiled, and torch.compile's search for the
instruction sets of this processor another three. Nothing is computed: there are no threads to lose.
"""

import contextlib

import torch._inductor.compile_fx  # noqa: F401

from . import bench_train_step  # noqa: F401  transformers, too

with contextlib.suppress(ImportError, AttributeError):  # it saves time, and nothing else
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.pick_vec_isa()
