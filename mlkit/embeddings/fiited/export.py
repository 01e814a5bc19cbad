"""Dynamic embeddings as stock modules, for serving or for other tools."""

from __future__ import annotations

from typing import Any

from mlkit.embeddings.fiited.collection import DynamicEmbeddingBagCollection
from mlkit.embeddings.fiited.module import DynamicTable
from mlkit.errors import InvalidTypeError

__all__ = ["to_dense"]


def to_dense(module: Any) -> Any:
    """Return stock modules that compute the same; the tables take their full size again.

    A whole model is put back by `mlkit.restore`.

    Args:
        module: A `DynamicEmbedding`, `DynamicEmbeddingBag` or `DynamicEmbeddingBagCollection`.

    Returns:
        An `nn.Embedding`, an `nn.EmbeddingBag`, or a dictionary of these by table.

    Raises:
        InvalidTypeError: For another module.
    """
    if isinstance(module, DynamicTable | DynamicEmbeddingBagCollection):
        return module.to_dense()
    raise InvalidTypeError(
        f"module must be a dynamic embedding or a collection of them, got {type(module).__name__}; "
        "mlkit.restore(model) turns a whole model back"
    )
