"""A `DynamicEmbeddingBagCollection` in TorchRec's terms: KeyedJaggedTensor in, KeyedTensor out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlkit.errors import InvalidTypeError, InvalidValueError, MissingDependencyError

if TYPE_CHECKING:
    from mlkit.embeddings.fiited.collection import DynamicEmbeddingBagCollection

__all__ = ["pool_keyed"]


def pool_keyed(collection: DynamicEmbeddingBagCollection, features: Any) -> Any:
    """Look the features of a `KeyedJaggedTensor` up.

    Returns:
        A `KeyedTensor` with the keys `collection.embedding_names`.

    Raises:
        InvalidTypeError: For something else than a `KeyedJaggedTensor`.
        InvalidValueError: If its features have batches of several sizes.
        MissingDependencyError: If TorchRec is not installed.
    """
    try:
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
    except ImportError as error:
        raise MissingDependencyError(
            f"a {type(features).__name__} is no mapping of features to tensors; for a "
            "KeyedJaggedTensor, TorchRec is needed: pip install 'mlkit-torch[torchrec]'"
        ) from error
    if not isinstance(features, KeyedJaggedTensor):
        raise InvalidTypeError(
            f"features must be a mapping or a KeyedJaggedTensor, got {type(features).__name__}"
        )
    if features.variable_stride_per_key():
        raise InvalidValueError(
            "features must have one batch size; this KeyedJaggedTensor has "
            f"{features.stride_per_key()}"
        )
    jagged = {}
    for name, one in features.to_dict().items():
        parts = (one.values(), one.offsets())
        jagged[name] = (*parts, one.weights()) if collection.is_weighted else parts
    return KeyedTensor(
        keys=list(collection.embedding_names),
        length_per_key=list(collection.embedding_dims),
        values=collection(jagged),
    )
