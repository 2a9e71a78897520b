"""The nearest patches of each prototype, against a sort of all similarities."""

import copy

import numpy as np
import pytest

from protoclf.explanation import BOX
from protoclf.nearest_patches import nearest_patches, purity
from protoclf.network import ProtoPNet


@pytest.mark.parametrize("k", [1, 5, 100])
@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_they_are_those_of_a_sort(fitted, squares, k, batch_size):
    X, y = squares
    fitted.set_params(batch_size=batch_size)
    table = nearest_patches(fitted, X, k, y)
    g, maps = fitted.transform(X), fitted.similarity_maps(X)
    fitted.set_params(batch_size=8)
    for j, rows in table.groupby("prototype"):
        order = np.argsort(-g[:, j], kind="stable")[:k]
        np.testing.assert_allclose(rows["similarity"], g[order, j], atol=1e-5)
        np.testing.assert_array_equal(rows["rank"], np.arange(len(order)) + 1)
        np.testing.assert_allclose(g[rows["sample"], j], g[order, j], atol=1e-5)
        for i, row, col in rows[["sample", "row", "col"]].to_numpy():
            assert maps[i, j, row, col] == pytest.approx(maps[i, j].max(), abs=1e-5)
        assert (rows["label"] == y[rows["sample"]]).all()
        assert (rows["class"] == fitted.prototypes_["class"][j]).all()


@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_of_equally_similar_ones_the_first_comes_first(fitted, squares, monkeypatch, batch_size):
    activations = ProtoPNet.activations
    monkeypatch.setattr(ProtoPNet, "activations", lambda self, d: activations(self, d).round())
    X, clf = squares[0], copy.deepcopy(fitted).set_params(batch_size=batch_size)
    table, g = nearest_patches(clf, X, 5), clf.transform(X)
    assert len(np.unique(g)) < 10
    for j, rows in table.groupby("prototype"):
        assert rows["sample"].tolist() == np.argsort(-g[:, j], kind="stable")[:5].tolist()


def test_boxes_and_cells_are_those_of_the_sheet(fitted, squares):
    X, _ = squares
    sheet = fitted.explain(X, "all").drop_duplicates(["sample", "prototype"])
    both = nearest_patches(fitted, X, 3).merge(sheet, on=["sample", "prototype"])
    assert len(both)
    for name in ("row", "col", *BOX):
        assert (both[f"{name}_x"] == both[f"{name}_y"]).all(), name


def test_a_prototype_is_nearest_to_its_source(fitted, squares):
    table = nearest_patches(fitted, squares[0], 1)
    sources = fitted.prototypes_
    assert table["sample"].tolist() == sources["source_index"].tolist()
    assert table[BOX].to_numpy().tolist() == sources[BOX].to_numpy().tolist()
    assert table["path"].isna().all()
    assert table["label"].isna().all()


def test_purity_is_the_share_of_the_own_class(fitted, squares):
    X, y = squares
    table = nearest_patches(fitted, X, 8, y)
    shares = purity(table)
    for j, rows in table.groupby("prototype"):
        assert shares[j] == (rows["label"] == rows["class"]).mean()
    assert purity(nearest_patches(fitted, X, 1, y)).eq(1).all()
    with pytest.raises(ValueError, match="purity needs labels"):
        purity(nearest_patches(fitted, X, 2))
    with pytest.raises(ValueError, match=r"it lacks the columns \['label'\]"):
        purity(table.drop(columns="label"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "k must be an int >= 1; got 0"),
        ({"percentile": 100}, "percentile must be 0, or a"),
    ],
)
def test_wrong_arguments_are_refused(fitted, squares, wrong, message):
    with pytest.raises(ValueError, match=message):
        nearest_patches(fitted, squares[0], **wrong)
