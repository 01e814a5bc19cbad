"""Baselines for embedding tables of fewer bytes: each a drop-in for `nn.EmbeddingBag`."""
