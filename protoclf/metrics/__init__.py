"""How interpretable a fitted classifier is, as numbers.

A metric takes a fitted classifier, and as a rule images. It returns a table with one row for each
image, prototype or box, and the score is the mean of a column (`global_size` returns a number).
`bootstrap_interval` says how far to trust a mean, `random_prototypes` what it is worth by chance,
and `interpretability_report` does all of it.
"""

from protoclf.metrics.baselines import random_prototypes
from protoclf.metrics.bootstrap import bootstrap_interval
from protoclf.metrics.confounders import find_confounders
from protoclf.metrics.curves import deletion_insertion
from protoclf.metrics.faithfulness import deletion_score
from protoclf.metrics.masks import cover
from protoclf.metrics.misalignment import spatial_misalignment
from protoclf.metrics.object_metrics import PartMasks, object_coverage, pointing
from protoclf.metrics.part_labels import PartLabels
from protoclf.metrics.part_metrics import consistency, stability
from protoclf.metrics.prototype_metrics import distinctness, global_size, sparsity
from protoclf.metrics.purity import part_purity
from protoclf.metrics.ranks import rank_stability
from protoclf.metrics.report_table import interpretability_report

__all__ = [
    "PartLabels",
    "PartMasks",
    "bootstrap_interval",
    "consistency",
    "cover",
    "deletion_insertion",
    "deletion_score",
    "distinctness",
    "find_confounders",
    "global_size",
    "interpretability_report",
    "object_coverage",
    "part_purity",
    "pointing",
    "random_prototypes",
    "rank_stability",
    "sparsity",
    "spatial_misalignment",
    "stability",
]
