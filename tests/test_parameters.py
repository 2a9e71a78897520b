"""What each parameter may be."""

import numpy as np
import pytest

from protoclf.parameters import normalization


def test_normalization():
    mean, std = normalization("imagenet")
    assert mean == (0.485, 0.456, 0.406)
    assert std == (0.229, 0.224, 0.225)
    assert normalization(([0.5] * 3, np.full(3, 0.25))) == ((0.5,) * 3, (0.25,) * 3)
    for wrong in ("cifar", None, 0.5, ([0.5], [0.5]), ([0, 0, np.nan], [1] * 3), ("a", "b")):
        with pytest.raises(ValueError, match="normalization must be 'imagenet' or"):
            normalization(wrong)
    for wrong in (([127] * 3, [128] * 3), ([0.5] * 3, [0, 1, 1])):
        with pytest.raises(ValueError, match="divided by 255"):
            normalization(wrong)
