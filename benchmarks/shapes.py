"""Named shapes, from real pairs of teacher and student."""

from dataclasses import dataclass

from .harness import Goal


@dataclass(frozen=True, kw_only=True)
class Shape:
    goals: tuple[Goal, ...] = ()  # in float32 on a CPU
    is_quick: bool = False  # in the quick suite too
    is_big: bool = False  # on a GPU only: there a large model's own sizes; none was run yet


@dataclass(frozen=True)
class FeatureShape(Shape):
    """Layer pairs of `feature_alignment`: `pairs` times N rows of Ds and Dt columns."""

    pairs: int
    rows: int
    student_width: int
    teacher_width: int

    @property
    def is_projected(self) -> bool:
        return self.student_width != self.teacher_width


@dataclass(frozen=True)
class AttentionShape(Shape):
    """Layer pairs of `attention_kl`: `pairs` times B texts of T tokens, H heads of width K."""

    pairs: int
    batch: int
    tokens: int
    heads: tuple[int, int]  # of the student and of the teacher
    widths: tuple[int, int]  # of a head, likewise
    is_causal: bool = False
    key_heads: int | None = None  # of both, where several heads share them

    @property
    def is_mean(self) -> bool:
        return self.heads[0] != self.heads[1]

    @property
    def gflop(self) -> float:
        """2 FLOPs of every product needed: the scores of both sides, dQ and dK."""
        keys = (self.tokens + 1) / 2 if self.is_causal else self.tokens
        columns = 3 * self.heads[0] * self.widths[0] + self.heads[1] * self.widths[1]
        return 2 * self.pairs * self.batch * self.tokens * keys * columns / 1e9


@dataclass(frozen=True)
class MapShape(Shape):
    """Layer pairs of `attention_map_kl`: `pairs` times B x H maps of T x T."""

    pairs: int
    batch: int
    heads: int
    tokens: int


@dataclass(frozen=True)
class OutputShape(Shape):
    """N tokens over a vocabulary of V; widths of hidden states, or None where logits are given."""

    tokens: int
    vocabulary: int
    widths: tuple[int, int] | None = None  # of the student and of the teacher

    @property
    def gflop(self) -> float:
        """2 FLOPs of every product needed: logits of both sides, dH and dW."""
        return 2 * self.tokens * self.vocabulary * (3 * self.widths[0] + self.widths[1]) / 1e9


@dataclass(frozen=True)
class TopShape(Shape):
    """N tokens with k stored entries each over a vocabulary of V, hidden states of one width."""

    tokens: int
    vocabulary: int
    width: int
    entries: int


@dataclass(frozen=True)
class StepShape(Shape):
    """A student and its teacher, in this order, and a batch of B texts of T tokens."""

    batch: int
    tokens: int
    layers: tuple[int, int]
    widths: tuple[int, int]
    heads: tuple[int, int]
    intermediate: tuple[int, int]
    vocabulary: int
    key_heads: int | None = None  # of both, for decoders; None: encoders


def goals(eager=None, compiled=None, liger=None, **at_most: float) -> tuple[Goal, ...]:
    """How many times faster than others, and how many times the time of the rest, at most."""
    least = {"eager": eager, "compiled": compiled, "liger": liger}
    return (
        *[Goal(name, at_least=value) for name, value in least.items() if value is not None],
        *[Goal(name.replace("_", " "), at_most=value) for name, value in at_most.items()],
    )


FEATURE_SHAPES = {
    # 12 layers of BERT-base against a copy of its width: 32 sequences of 128 tokens.
    "12 x 4096 x 768, no projection": FeatureShape(
        12, 4096, 768, 768, goals=goals(15, 3, limit=1.3), is_quick=True
    ),
    # MiniLM (384) under BERT-base (768), 6 pairs.
    "6 x 4096, 384 to 768": FeatureShape(
        6, 4096, 384, 768, goals=goals(1.8, 1.15, limit=1.1), is_quick=True
    ),
    # A narrow student under a BERT-large (1024), 6 pairs: the gram route.
    "6 x 4096, 256 to 1024": FeatureShape(6, 4096, 256, 1024, goals=goals(2.5, 1.45, limit=0.92)),
    # TinyBERT-4 (312) under BERT-base, short batches.
    "4 x 1024, 312 to 768": FeatureShape(4, 1024, 312, 768),
    "Llama-3.1-8B to 1B, 16 x 4096": FeatureShape(16, 4096, 2048, 4096, is_big=True),
    "Qwen3-8B to 0.6B, 28 x 4096": FeatureShape(28, 4096, 1024, 4096, is_big=True),
}

ATTENTION_SHAPES = {
    # MiniLM (12 heads of 32) under BERT-base (12 of 64).
    "B8 H12 T512, 32 and 64 wide": AttentionShape(
        1, 8, 512, (12, 12), (32, 64), goals=goals(11, 3.8, limit=1.6), is_quick=True
    ),
    # A small decoder under a large one.
    "B1 H8 T2048, 64 and 128 wide": AttentionShape(
        1, 1, 2048, (8, 8), (64, 128), goals=goals(7, 3.3, limit=1.4)
    ),
    "B1 H8 T2048, causal": AttentionShape(
        1, 1, 2048, (8, 8), (64, 128), True, goals=goals(10, 5, not_causal=0.75)
    ),
    # MiniLM under its own kind, six pairs of short texts.
    "6 x B32 H12 T128, 32 wide": AttentionShape(
        6, 32, 128, (12, 12), (32, 32), goals=goals(5, 2, limit=2.2)
    ),
    # Unequal head counts: maps are averaged over heads first.
    "B8 H6 and 12 T512, mean": AttentionShape(1, 8, 512, (6, 12), (32, 32), goals=goals(5, 2)),
    "Llama-3.1-8B to 1B, 4 x T4096": AttentionShape(
        4, 1, 4096, (32, 32), (64, 128), True, 8, is_big=True
    ),
    "Qwen3-8B to 0.6B, 4 x T4096, mean": AttentionShape(
        4, 1, 4096, (16, 32), (128, 128), True, 8, is_big=True
    ),
}

MAP_SHAPES = {
    "B8 H12 T512": MapShape(1, 8, 12, 512, is_quick=True),  # BERT-base at its full length
    "6 x B32 H12 T128": MapShape(6, 32, 12, 128),
    "Llama-3.1-8B to 1B, 2 x T4096": MapShape(2, 1, 32, 4096, is_big=True),
}

LINEAR_SHAPES = {
    # A Llama-2 vocabulary under small decoders.
    "N1024 V32000, 512 and 1024 wide": OutputShape(
        1024, 32000, (512, 1024), goals=goals(1.7, 1.1, 1.2, limit=1.1), is_quick=True
    ),
    # Qwen's vocabulary.
    "N512 V151936, 256 and 512 wide": OutputShape(
        512, 151936, (256, 512), goals=goals(2, 1.1, 1.25, limit=1.15)
    ),
    "Llama-3.1-8B to 1B, N4096": OutputShape(4096, 128256, (2048, 4096), is_big=True),
    "Qwen3-8B to 0.6B, N4096": OutputShape(4096, 151936, (1024, 4096), is_big=True),
    "Gemma-3 4B to 1B, N4096": OutputShape(4096, 262144, (1152, 2560), is_big=True),
}

LOGIT_SHAPES = {
    # The gradient is new memory, whose pages cost as much again as the 2 reads and 1 write.
    "2048 x 32000": OutputShape(2048, 32000, goals=goals(5, 2, sum=1.3), is_quick=True),
    # The logits of a classifier: never slower.
    "4096 x 8": OutputShape(4096, 8, goals=goals(1, 1)),
    "Llama-3.1, 4096 x 128256": OutputShape(4096, 128256, is_big=True),
    "Gemma-3, 4096 x 262144": OutputShape(4096, 262144, is_big=True),
}

TOPK_SHAPES = {
    "N1024 V32000, 512 wide, k 64": TopShape(1024, 32000, 512, 64, is_quick=True),
    "Llama-3.2-1B, N4096, k 64": TopShape(4096, 128256, 2048, 64, is_big=True),
}

STEP_SHAPES = {
    # TinyBERT's four layers under BERT-base, as a classifier.
    "BERT-base to 4 x 312, B8 T128": StepShape(
        8, 128, (4, 12), (312, 768), (12, 12), (1200, 3072), 30522, is_quick=True
    ),
    # SmolLM2-135M to 8 of its blocks.
    "SmolLM2-135M to 8 blocks, B2 T512": StepShape(
        2, 512, (8, 30), (576, 576), (9, 9), (1536, 1536), 49152, key_heads=3
    ),
    "Llama-3.1-8B to 1B, a quarter of their blocks, B1 T2048": StepShape(
        1, 2048, (4, 8), (2048, 4096), (32, 32), (8192, 14336), 128256, key_heads=8, is_big=True
    ),
}
