"""`torch.nn.EmbeddingBag` with vectors that grow and shrink (FIITED, arXiv 2401.04408)."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlkit.embeddings.fiited.config import FIITEDConfig
from mlkit.embeddings.fiited.lookup import check_offsets
from mlkit.embeddings.fiited.module import DynamicTable, resolve_config
from mlkit.embeddings.fiited.store import DynamicEmbeddingStore
from mlkit.errors import InvalidTypeError, InvalidValueError

__all__ = ["DynamicEmbeddingBag"]

Mode = Literal["sum", "mean", "max"]


class DynamicEmbeddingBag(DynamicTable):
    """Sums, means or maxima of bags of vectors that have as many dimensions as pay.

    The call is that of `torch.nn.EmbeddingBag`; the initial values are those of the config. A
    chunk without storage counts as zeros, in a maximum too. "max" and gradients of
    `per_sample_weights` look all rows up before they are pooled, which takes more memory.

    Args:
        num_embeddings: Rows, at least 1.
        embedding_dim: D, a multiple of the config's `num_chunks`.
        max_norm: Rows that are read and are longer are shortened to this length, in place.
        norm_type: The p of that length's p-norm.
        scale_grad_by_freq: Divide the gradient of a row by how often the batch holds it; not for
            "max".
        mode: "sum", "mean" or "max".
        sparse: Whether the gradient of the pool is a sparse tensor; dense under `torch.compile`.
        include_last_offset: Whether offsets end with the number of ids.
        padding_idx: A row that takes no part in any bag; negative ones count from the end.
        config: Budget, schedule, optimizer.
        name: Of the table, in messages.
        device: Of everything; `meta` builds the structure alone.
        dtype: float32, bfloat16 or float64.
        **settings: Fields of `FIITEDConfig`, instead of `config`.

    Shape:
        Input: [bags, ids] without offsets, or [ids] with offsets [bags] (one more with
        `include_last_offset`). Output: [bags, D].

    Raises:
        InvalidValueError: For values out of range.
        InvalidTypeError: For `config` and fields together, or unknown ones.

    Example:
        >>> import torch
        >>> bag = DynamicEmbeddingBag(1000, 16, mode="sum", memory_budget=0.9)
        >>> bag(torch.tensor([1, 2, 4, 5]), torch.tensor([0, 3])).shape
        torch.Size([2, 16])
    """

    _stock = nn.EmbeddingBag
    mode: Mode

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: Mode = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        config: FIITEDConfig | None = None,
        name: str = "embedding_bag",
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
            store,
            0,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            mode=mode,
            include_last_offset=include_last_offset,
        )

    def _set_up(
        self,
        store: DynamicEmbeddingStore,
        table: int,
        *,
        mode: Mode = "mean",
        include_last_offset: bool = False,
        **options: Any,
    ) -> None:
        super()._set_up(store, table, **options)
        if mode not in ("sum", "mean", "max"):
            raise InvalidValueError(f"mode must be sum, mean or max, got {mode!r} ({self.name})")
        if mode == "max" and self.scale_grad_by_freq:
            raise InvalidValueError(f"scale_grad_by_freq is not for mode 'max' ({self.name})")
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(
        self,
        input: Int[Tensor, "..."],
        offsets: Int[Tensor, " bags"] | None = None,
        per_sample_weights: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "bags dim"]:
        """Look bags of vectors up and pool each; an empty bag is zeros.

        Args:
            input: Ids.
            offsets: Where the bags begin in a 1-D input.
            per_sample_weights: A factor for each id, of the shape of `input`; for mode "sum".

        Raises:
            IndexOutOfRange: For an id outside the table.
            InvalidTypeError: For ids or offsets that are not int64 or int32.
            InvalidValueError: For shapes or offsets that do not fit.
        """
        weights = per_sample_weights
        self._check(input, offsets, weights)
        rows = self._rows(input)
        weights = None if weights is None else weights.reshape(-1)
        bag_size = 1
        if offsets is not None:
            if not self.include_last_offset:
                end = torch.full((1,), len(rows), dtype=offsets.dtype, device=offsets.device)
                offsets = torch.cat([offsets, end])
        elif input.shape[1]:
            bag_size = input.shape[1]
        else:
            offsets = rows.new_zeros(len(input) + 1)
        if self.mode == "max" or (weights is not None and weights.requires_grad):
            if offsets is None:
                offsets = torch.arange(0, len(rows) + 1, bag_size, device=rows.device)
            return self._pool(rows, offsets, weights)
        return self._lookup(rows, offsets, weights, bag_size=bag_size, mode=self.mode)

    def _pool(
        self, rows: Int[Tensor, " n"], offsets: Int[Tensor, " bags_plus_1"], weights: Tensor | None
    ) -> Float[Tensor, "bags dim"]:
        """Pool vectors after they were looked up one by one."""
        if not torch.compiler.is_compiling():
            check_offsets(self.name, offsets, len(rows))
        values = self._lookup(rows)
        place, padding = torch.arange(len(rows), device=rows.device), len(rows)
        if self.padding_idx is not None:
            place = torch.where(rows == self.padding_idx, padding, place)
        # One row more, which stands for padding; it also makes an empty input no empty table.
        values = torch.cat([values, values.new_zeros(1, self.embedding_dim)])
        return nn.functional.embedding_bag(
            place,
            values,
            offsets.long(),
            mode=self.mode,
            per_sample_weights=weights,
            include_last_offset=True,
            padding_idx=padding,
        )

    def _check(self, input: Tensor, offsets: Tensor | None, weights: Tensor | None) -> None:
        if input.dim() == 2 and offsets is not None:
            raise InvalidValueError(
                f"a 2-D input has bags of one size: offsets must be None ({self.name})"
            )
        if input.dim() == 1 and offsets is None:
            raise InvalidValueError(
                f"a 1-D input needs offsets, where its bags begin ({self.name}); one id to a bag "
                "is input.unsqueeze(1)"
            )
        if input.dim() not in (1, 2):
            raise InvalidValueError(
                f"input must have 1 or 2 dimensions, got shape {tuple(input.shape)} ({self.name})"
            )
        if offsets is not None:
            if offsets.dtype not in (torch.int64, torch.int32):
                raise InvalidTypeError(
                    f"offsets of table {self.name!r} must be int64 or int32, got {offsets.dtype}"
                )
            if offsets.dim() != 1:
                raise InvalidValueError(
                    f"offsets must have 1 dimension, got shape {tuple(offsets.shape)} ({self.name})"
                )
            if self.include_last_offset and len(offsets) < 1:
                raise InvalidValueError(
                    f"include_last_offset needs at least one offset, got none ({self.name})"
                )
        if weights is None:
            return
        if self.mode != "sum":
            raise InvalidValueError(
                f"per_sample_weights are for mode 'sum', this is {self.mode!r} ({self.name})"
            )
        if weights.shape != input.shape:
            raise InvalidValueError(
                f"per_sample_weights must have the shape of the input, {tuple(input.shape)}, got "
                f"{tuple(weights.shape)} ({self.name})"
            )

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Float[Tensor, "rows dim"],
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: Mode = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        config: FIITEDConfig | None = None,
        name: str = "embedding_bag",
        **settings: Any,
    ) -> Self:
        """Make a module of a dense table: exactly at density 1, else its largest chunks.

        Args:
            embeddings: Copied; gives device and dtype.
            freeze: Whether it learns no more, as in `nn.EmbeddingBag.from_pretrained`.
            max_norm: As in the constructor, and so on.
            norm_type: See there.
            scale_grad_by_freq: See there.
            mode: See there.
            sparse: See there.
            include_last_offset: See there.
            padding_idx: See there; its row is not kept.
            config: See there.
            name: See there.
            **settings: See there.

        Raises:
            InvalidValueError: For a density below 1 without `warm_start="magnitude"`.
        """
        rows, dim = embeddings.shape
        made = cls(
            rows, dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse, include_last_offset,
            padding_idx, config=config, name=name, device=embeddings.device,
            dtype=embeddings.dtype, **settings,
        )  # fmt: skip
        return made._fill(embeddings, freeze)

    def _stock_options(self) -> tuple[str, ...]:
        return (*super()._stock_options(), "mode", "include_last_offset")
