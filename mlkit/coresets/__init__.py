"""Coreset selection: which examples of a data set are worth training on.

Scores (`TrainingDynamics`, `DynamicsRecorder`, `ScoreTable`) say how hard each example is;
selectors (`CCS` and its peers) map scores to indices; `CoresetSubset` and `CoverageCentricSampler`
train on them; `coverage_auc` says how well they cover the data.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
