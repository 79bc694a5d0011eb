"""Qwen3-VL (dense and MoE): vision encoder, text model and head, as the runner calls them.

Legend: T tokens, P patches, M visual tokens, R rows that want logits, n text hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from executor.checkpoint.pull import Catalog, Pull, pull_all
from executor.engine.forward import ForwardMeta
from executor.layers.embedding import Head
from executor.layers.rope import MRope
from executor.layers.vision import Grid
from executor.parallel.groups import SINGLE, Parallel
from models.qwen3_vl.config import Config
from models.qwen3_vl.text import Text
from models.qwen3_vl.vision import Vision


class Model(nn.Module):
    def __init__(self, config: Config, parallel: Parallel = SINGLE) -> None:
        super().__init__()
        text = config.text
        self.config = config
        self.rope = MRope(text.head_dim, text.rope, interleaved=True)
        self.visual = Vision(config.vision, parallel.vision)
        self.language_model = Text(text, parallel)
        tied = self.language_model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = Head(text.vocab_size, text.hidden_size, parallel.text, tied)

    @property
    def num_taps(self) -> int:
        """DeepStack features that come with every visual token."""
        return len(self.config.vision.deepstack_layers)

    def pulls(self, catalog: Catalog) -> Iterator[Pull]:
        """Every tensor this rank needs, by canonical name."""
        yield from pull_all(self.visual, catalog, "model.visual")
        yield from pull_all(self.language_model, catalog, "model.language_model")
        yield from self.lm_head.pulls(catalog, "lm_head")

    def encode(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Packed normalised patches `[P, C*tp*p*p]` -> `[M, 1 + num_taps, n]`."""
        return self.visual(patches, grids)

    def help(self, padded_tokens: int) -> None:
        """Take part in the experts' step of the other replicas, without tokens of its own."""
        self.language_model.help(padded_tokens)

    def embed(self, token_ids: Tensor) -> Tensor:
        """`[T] -> [T, n]`."""
        return self.language_model.embed_tokens(token_ids)

    def forward(self, embeddings: Tensor, meta: ForwardMeta) -> Tensor:
        """`[T, n]` -> logits of the selected tokens, fp32 `[R, V]`."""
        return self.lm_head(self.language_model(embeddings, meta))
