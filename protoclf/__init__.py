"""ProtoPNet for scikit-learn: "this looks like that", as an image classifier that says why."""

from protoclf.classifier import ProtoPNetClassifier
from protoclf.ensemble import ProtoPNetEnsemble
from protoclf.image_errors import ImageError

__all__ = ["ImageError", "ProtoPNetClassifier", "ProtoPNetEnsemble"]
