"""Totals and comparisons of sheets, and what a sheet is after a trip through a file."""

import io

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone

from protoclf.sheets import class_totals, compare


@pytest.mark.parametrize("top", [None, 1])
def test_totals_are_the_logits(fitted, squares, top):
    X, _ = squares
    sheet = fitted.explain(X, "all", top)
    totals = class_totals(sheet)
    logits = fitted.decision_function(X)
    column = {label: i for i, label in enumerate(fitted.classes_)}
    places = totals["class"].map(column)
    expected = logits[totals["sample"], places]
    np.testing.assert_allclose(totals["total"], expected, atol=1e-4)
    np.testing.assert_allclose(totals["logit"], expected, atol=1e-4)
    assert totals.groupby("sample")["is_predicted"].first().all()
    named = sheet[sheet["prototype"].notna()]
    own = named["prototype_class"] == named["class"]
    for name, rows in (("own", named[own]), ("others", named[~own])):
        sums = rows.groupby(["sample", "class"])["contribution"].sum()
        keys = pd.MultiIndex.from_frame(totals[["sample", "class"]])
        np.testing.assert_allclose(totals[name], sums.reindex(keys, fill_value=0), atol=1e-12)
    if top is None:
        np.testing.assert_allclose(totals["own"] + totals["others"], totals["total"])
        weights = (fitted.coef_ != 0).sum(1)
        assert totals["n_prototypes"].tolist() == weights[places].tolist()


def test_differences_sum_to_that_of_the_logits(fitted, squares):
    X, _ = squares
    table = compare(fitted.explain(X, "top2"))
    best = np.sort(fitted.decision_function(X), axis=1)
    np.testing.assert_allclose(
        table.groupby("sample")["difference"].sum(), best[:, -1] - best[:, -2], atol=1e-4
    )
    assert table.groupby("sample")["class"].first().tolist() == fitted.predict(X).tolist()
    column = {label: i for i, label in enumerate(fitted.classes_)}
    for row in table.to_dict("records"):
        for side, name in (("", "class"), ("rival_", "rival")):
            assert row[side + "weight"] == fitted.coef_[column[row[name]], row["prototype"]]
            product = row["similarity"] * row[side + "weight"]
            assert row[side + "contribution"] == pytest.approx(product)
    sizes = table["difference"].abs().groupby(table["sample"])
    assert sizes.apply(lambda d: d.is_monotonic_decreasing).all()


@pytest.mark.parametrize("classes", ["predicted", "all"])
def test_a_comparison_takes_two_classes(fitted, squares, classes):
    with pytest.raises(ValueError, match="compare needs two classes for each sample"):
        compare(fitted.explain(squares[0], classes))


@pytest.mark.parametrize("summary", [class_totals, compare])
def test_what_is_no_sheet_is_refused_by_its_columns(fitted, squares, summary):
    sheet = fitted.explain(squares[0][:2], "top2")
    with pytest.raises(ValueError, match=r"a scoring sheet, .* lacks the columns \['contribution'"):
        summary(sheet.drop(columns="contribution"))
    with pytest.raises(ValueError, match=r"explain\(X\); it lacks the columns \['sample'"):
        summary(fitted)


def test_a_comparison_takes_whole_sheets(fitted, squares):
    with pytest.raises(ValueError, match="compare needs whole sheets"):
        compare(fitted.explain(squares[0], "top2", top=1))
    with pytest.raises(ValueError, match="a sheet with rows"):
        compare(fitted.explain(squares[0], "top2").head(0))


@pytest.fixture(scope="module", params=["text", "numbers", "long ids", "booleans"])
def fitted_on_labels(fitted, squares, request):
    if request.param == "text":
        return fitted
    X, y = squares
    codes = np.unique(y, return_inverse=True)[1]
    labels = {
        "numbers": codes,
        "long ids": codes.astype(np.uint64) + 2**63,
        "booleans": y == "red",
    }
    return clone(fitted).fit(X, labels[request.param])


@pytest.mark.parametrize("top", [None, 1])
def test_parquet_brings_back_the_same_sheet(fitted_on_labels, squares, tmp_path, top):
    sheet = fitted_on_labels.explain(squares[0][:4], "top2", top)
    sheet.to_parquet(tmp_path / "sheet.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "sheet.parquet"), sheet)


def test_csv_json_and_latex_hold_every_number(fitted, squares):
    sheet = fitted.explain(squares[0][:4], "top2", top=2)
    csv = pd.read_csv(io.StringIO(sheet.to_csv(index=False)))
    json = pd.read_json(io.StringIO(sheet.to_json(orient="records")))
    for back in (csv, json):
        for name in ("logit", "similarity", "weight", "contribution", "x0", "source_y1"):
            np.testing.assert_allclose(back[name], sheet[name].astype(float), rtol=1e-6)
        assert back["class"].tolist() == sheet["class"].tolist()
    assert len(sheet[["class", "prototype", "contribution"]].to_latex().splitlines()) > len(sheet)
