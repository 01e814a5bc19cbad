"""Clicks: streams of labelled examples with tables of ids, in the order of time (no torch here)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
