"""Pictures hold the numbers that they are drawn from."""

import matplotlib as mpl
import numpy as np
import pytest

from protoclf.plotting import plot_last_layer_path


@pytest.fixture(autouse=True)
def no_screen():
    mpl.use("agg")


def test_the_path_of_the_penalty_is_drawn(fitted, squares, tmp_path):
    from matplotlib import pyplot as plt

    path = fitted.last_layer_path(*squares, [1e-2, 1e-3], folds=2)
    display = plot_last_layer_path(path)
    accuracy, weights = display.axes_
    left_out = accuracy.get_lines()[1]
    np.testing.assert_allclose(left_out.get_xdata(), path["lambda_l1"])
    np.testing.assert_allclose(left_out.get_ydata(), path["accuracy"])
    np.testing.assert_allclose(weights.get_lines()[0].get_ydata(), path["n_nonzero"])
    display.figure_.savefig(tmp_path / "path.png")
    figure, axes = plt.subplots()
    assert plot_last_layer_path(path, axes).figure_ is figure
    plt.close("all")
