"""FIITED: embedding tables whose vectors grow and shrink while they train."""
