"""A classifier that reads the mean of its tokens, as sentence encoders are trained to be read."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

HEAD = "mean_head.safetensors"  # beside the encoder's own files


class MeanClassifier(nn.Module):
    """An encoder, the mean over its tokens, dropout and a linear layer.

    Sentence encoders such as MiniLM, E5 or BGE are trained through the mean of their tokens; the
    heads of transformers read the first token, which those models never learned to use.

    Args:
        encoder: a Hugging Face encoder without a head. Its config says how many outputs there are
            (`num_labels`), and whether they are classes or, for `problem_type` "regression",
            numbers.
        dropout: share of the mean's features that are dropped in training.
    """

    def __init__(self, encoder: PreTrainedModel, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.config.hidden_size, encoder.config.num_labels)

    @property
    def config(self) -> PreTrainedConfig:
        """The encoder's, from which widths, layers and labels are read."""
        return self.encoder.config

    @property
    def base_model(self) -> PreTrainedModel:
        """The encoder, under the name that transformers give it."""
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's word embeddings."""
        return self.encoder.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 for tokens and 0 for padding.
            token_type_ids: [B, T], of pairs of texts.
            labels: [B], -100 where a text has none (at least one must have one); or numbers.
        """
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types)[0]
        weights = attention_mask[..., None].to(hidden.dtype)
        mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        logits = self.head(self.dropout(mean))
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        if self.config.problem_type == "regression":
            loss = F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        else:
            loss = F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the encoder as `AutoModel.from_pretrained` reads it, and the head beside it.

        Args:
            folder: receives both.
            state_dict: weights in place of the model's own.
        """
        state = self.state_dict() if state_dict is None else state_dict
        parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "head": {}}
        for name, tensor in state.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.encoder.save_pretrained(folder, state_dict=parts["encoder"])
        save_file(parts["head"], Path(folder) / HEAD)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: object) -> "MeanClassifier":
        """Read what `save_pretrained` wrote, or an encoder alone; in float32 and eval mode.

        Args:
            folder: of the encoder; the head is fresh where there is none, or none of this size.
            settings: of the encoder's config, such as `id2label`.
        """
        model = cls(AutoModel.from_pretrained(folder, dtype=torch.float32, **settings))
        if has_mean_head(folder):
            model._take_head(load_file(Path(folder) / HEAD))
        return model.eval()

    def like(self, encoder: PreTrainedModel) -> "MeanClassifier":
        """Another encoder under a head like this one, with its weights where they fit."""
        twin = type(self)(encoder, self.dropout.p)
        twin._take_head(self.head.state_dict())
        return twin.eval()

    def _take_head(self, weights: Mapping[str, Tensor]) -> None:
        if weights["weight"].shape == self.head.weight.shape:
            self.head.load_state_dict(weights)


def has_mean_head(folder: str | Path) -> bool:
    """Whether `MeanClassifier.from_pretrained` reads this folder."""
    return (Path(folder) / HEAD).is_file()
