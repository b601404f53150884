"""Teacher and student of a text classification: an encoder with a head, and a narrower copy."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class TextClassifier(nn.Module):
    """An encoder, the mean over its tokens, dropout and a linear layer.

    Sentence encoders such as MiniLM are trained through the mean of their tokens; the heads of
    transformers read the first token, which those models never learned to use.
    """

    def __init__(self, encoder: PreTrainedModel, classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    @property
    def config(self):
        """The encoder's, from which widths and layers are read."""
        return self.encoder.config

    @property
    def base_model(self) -> PreTrainedModel:
        """The encoder, under the name that transformers give it."""
        return self.encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 for tokens and 0 for padding.
            labels: [B], -100 where a text has none; at least one must have one.
        """
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask[..., None].to(hidden.dtype)
        mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        logits = self.head(self.dropout(mean))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load_classifier(folder: str | Path, classes: int) -> TextClassifier:
    """The encoder in a folder with a fresh head."""
    return TextClassifier(AutoModel.from_pretrained(folder), classes)


@torch.no_grad()
def narrow_copy(teacher: TextClassifier, layers: int, width: int) -> TextClassifier:
    """A student of the teacher's family with fewer blocks and narrower hidden states.

    Embeddings start as the teacher's, seen along the main axes (PCA) of its word embeddings;
    everything else is drawn at random. The width of an attention head stays as it is.

    Raises:
        ValueError: a width that is no multiple of the head's, or wider than the teacher.
    """
    settings = copy.deepcopy(teacher.config)
    teacher_width = settings.hidden_size
    head_width = teacher_width // settings.num_attention_heads
    if width % head_width or not 0 < width <= teacher_width:
        raise ValueError(
            f"student_width must be a multiple of {head_width}, the teacher's width per head, and "
            f"at most {teacher_width}: got {width}; change it."
        )
    settings.num_hidden_layers = layers
    settings.hidden_size = width
    settings.num_attention_heads = width // head_width
    settings.intermediate_size = settings.intermediate_size * width // teacher_width
    student = TextClassifier(
        AutoModel.from_config(settings), teacher.head.out_features, teacher.dropout.p
    )
    words = teacher.encoder.get_input_embeddings().weight
    axes = torch.linalg.eigh(torch.cov(words.T)).eigenvectors.flip(1)[:, :width]
    for name, module in teacher.encoder.named_modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == teacher_width:
            student.encoder.get_submodule(name).weight.copy_(module.weight @ axes)
    return student
