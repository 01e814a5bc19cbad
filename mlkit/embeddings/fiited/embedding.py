"""`torch.nn.Embedding` with vectors that grow and shrink (FIITED, arXiv 2401.04408)."""

from __future__ import annotations

from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlkit.embeddings.fiited.config import FIITEDConfig
from mlkit.embeddings.fiited.module import DynamicTable, resolve_config
from mlkit.errors import InvalidValueError

__all__ = ["DynamicEmbedding"]


class DynamicEmbedding(DynamicTable):
    """A lookup table whose vectors have as many dimensions as pay within a budget of memory.

    The call is that of `torch.nn.Embedding`; the initial values are those of the config.

    Args:
        num_embeddings: Rows, at least 1.
        embedding_dim: D, a multiple of the config's `num_chunks`.
        padding_idx: A row that is zeros and never learns; negative ones count from the end.
        max_norm: Rows that are read and are longer are shortened to this length, in place.
        norm_type: The p of that length's p-norm.
        scale_grad_by_freq: Divide the gradient of a row by how often the batch holds it.
        sparse: Whether the gradient of the pool is a sparse tensor; dense under `torch.compile`.
        config: Budget, schedule, optimizer.
        name: Of the table, in messages.
        device: Of everything; `meta` builds the structure alone.
        dtype: float32, bfloat16 or float64.
        **settings: Fields of `FIITEDConfig`, instead of `config`.

    Shape:
        Input: any shape, int64 or int32. Output: that shape and D.

    Raises:
        InvalidValueError: For values out of range.
        InvalidTypeError: For `config` and fields together, or unknown ones.

    Example:
        >>> import torch
        >>> table = DynamicEmbedding(1000, 16, target_density=1.0)
        >>> table(torch.tensor([[1, 2], [4, 999]])).shape
        torch.Size([2, 2, 16])
    """

    _stock = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        config: FIITEDConfig | None = None,
        name: str = "embedding",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        config = resolve_config(config, settings)
        store = self._new_store(
            num_embeddings, embedding_dim, padding_idx, name, config,
            sparse=sparse, device=device, dtype=dtype,
        )  # fmt: skip
        self._set_up(
            store, 0, max_norm=max_norm, norm_type=norm_type, scale_grad_by_freq=scale_grad_by_freq
        )

    def forward(self, input: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """Look vectors up.

        Raises:
            IndexOutOfRange: For an id outside the table.
            InvalidTypeError: For ids that are not int64 or int32.
        """
        found = self._lookup(self._rows(input))
        return found.view(*input.shape, self.embedding_dim)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Float[Tensor, "rows dim"],
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        config: FIITEDConfig | None = None,
        name: str = "embedding",
        **settings: Any,
    ) -> Self:
        """Make a module of a dense table: exactly at density 1, else its largest chunks.

        Args:
            embeddings: Copied; gives device and dtype.
            freeze: Whether it learns no more, as in `nn.Embedding.from_pretrained`.
            padding_idx: As in the constructor, and so on.
            max_norm: See there.
            norm_type: See there.
            scale_grad_by_freq: See there.
            sparse: See there.
            config: See there.
            name: See there.
            **settings: See there.

        Raises:
            InvalidValueError: For a density below 1 without `warm_start="magnitude"`, or a padding
                row that is not zeros.
        """
        rows, dim = embeddings.shape
        made = cls(
            rows, dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            config=config, name=name, device=embeddings.device, dtype=embeddings.dtype, **settings,
        )  # fmt: skip
        made._check_padding(embeddings)
        return made._fill(embeddings, freeze)

    def _check_padding(self, weight: Tensor) -> None:
        if self.padding_idx is not None and bool(weight[self.padding_idx].any()):
            raise InvalidValueError(
                f"row padding_idx={self.padding_idx} of table {self.name!r} is not zeros, and "
                "padding has no storage here; set it to zeros, or padding_idx to None"
            )
