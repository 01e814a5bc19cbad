"""Coreset selection: which examples of a data set are worth training on.

Scores (`TrainingDynamics`, `DynamicsRecorder`, `ScoreTable`) say how hard each example is;
selectors (`CCS` and its peers) map scores to indices; `CoresetSubset` and `CoverageCentricSampler`
train on them; `coverage_auc` says how well they cover the data.
"""

from typing import TYPE_CHECKING

from mlkit._lazy import lazy_exports

if TYPE_CHECKING:
    from mlkit.coresets.mislabel import auto_cutoff, mislabel_fraction
    from mlkit.coresets.beta_sampling import BetaSampling
    from mlkit.coresets.callback import TrainingDynamics
    from mlkit.coresets.ccs import CCS
    from mlkit.coresets.coverage import coverage_auc, coverage_curve, min_distances
    from mlkit.coresets.d2 import D2
    from mlkit.coresets.dataset import CoresetSubset, IndexedDataset
    from mlkit.coresets.dynamics import DynamicsRecorder
    from mlkit.coresets.facility_location import FacilityLocation
    from mlkit.coresets.grand import exact_grand
    from mlkit.coresets.k_center import KCenterGreedy
    from mlkit.coresets.lightning import CoresetDataModule, IndexedStepMixin
    from mlkit.coresets.moderate import Moderate
    from mlkit.coresets.pipeline import HardCutoff, Pipeline
    from mlkit.coresets.sampler import CoverageCentricSampler
    from mlkit.coresets.scores import ArrayScore, ScoreTable
    from mlkit.coresets.search import search_cutoff
    from mlkit.coresets.selection import Selection, Selector
    from mlkit.coresets.semdedup import SemDeDup
    from mlkit.coresets.simple import RandomSelector, TopK
    from mlkit.coresets.stratified import Stratified

_EXPORTS = {
    "ArrayScore": "scores",
    "BetaSampling": "beta_sampling",
    "CCS": "ccs",
    "CoresetDataModule": "lightning",
    "CoresetSubset": "dataset",
    "CoverageCentricSampler": "sampler",
    "D2": "d2",
    "DynamicsRecorder": "dynamics",
    "FacilityLocation": "facility_location",
    "HardCutoff": "pipeline",
    "IndexedDataset": "dataset",
    "IndexedStepMixin": "lightning",
    "KCenterGreedy": "k_center",
    "Moderate": "moderate",
    "Pipeline": "pipeline",
    "RandomSelector": "simple",
    "ScoreTable": "scores",
    "Selection": "selection",
    "Selector": "selection",
    "SemDeDup": "semdedup",
    "Stratified": "stratified",
    "TopK": "simple",
    "TrainingDynamics": "callback",
    "auto_cutoff": "mislabel",
    "coverage_auc": "coverage",
    "coverage_curve": "coverage",
    "exact_grand": "grand",
    "min_distances": "coverage",
    "mislabel_fraction": "mislabel",
    "search_cutoff": "search",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
