"""The view of a sheet in a notebook."""

import base64
import copy
import io
import re

import numpy as np
import PIL.Image
import pytest
from sklearn.base import clone

from protoclf.styling import style_sheet

pytest.importorskip("jinja2", reason="pandas' styles are Jinja2 templates")


def pictures_in(html):
    found = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    return [PIL.Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_patches_are_those_of_the_boxes(fitted, squares):
    X, _ = squares
    sheet = fitted.explain(X[:2], "top2", top=1)
    html = style_sheet(fitted, sheet, X[:2], side=96).to_html()
    named = sheet[sheet["prototype"].notna()]
    found = pictures_in(html)
    assert len(found) == 2 * len(named)
    for k, row in enumerate(named.to_dict("records")):
        part = X[row["sample"], row["y0"] : row["y1"], row["x0"] : row["x1"]]
        source = fitted.source_image(row["prototype"])
        source = source[row["source_y0"] : row["source_y1"], row["source_x0"] : row["source_x1"]]
        for picture, expected in zip(found[2 * k : 2 * k + 2], (part, source), strict=True):
            np.testing.assert_array_equal(np.asarray(picture), expected)
        assert f"{row['contribution']:.2f}" in html
    assert "(rest)" in html


def test_a_part_that_is_unlike_the_other_is_marked(fitted, squares):
    opposed = copy.deepcopy(fitted)
    opposed.module_.prototypes.data.neg_()
    for clf in (fitted, opposed):
        sheet = clf.explain(squares[0][:2], "all")
        below = sheet.loc[sheet["similarity"] < 0, "similarity"]
        html = style_sheet(clf, sheet, squares[0][:2]).to_html()
        found = re.findall(r">(unlike: [^<]*)<", html)
        assert found == [f"unlike: {value:.2f}" for value in below]
    assert found  # of the opposed one


def test_pictures_come_from_paths_where_the_sheet_has_them(fitted, paths):
    sheet = fitted.explain(paths[:1], top=2)
    expected = style_sheet(fitted, sheet, paths[:1])
    assert pictures_in(style_sheet(fitted, sheet).to_html())
    assert re.sub("T_[0-9a-f]+", "", style_sheet(fitted, sheet).to_html()) == re.sub(
        "T_[0-9a-f]+", "", expected.to_html()
    )


def test_a_sheet_without_paths_needs_the_images(fitted, squares):
    with pytest.raises(ValueError, match="The sheet has no paths: pass the images as X"):
        style_sheet(fitted, fitted.explain(squares[0][:1]))


def test_what_is_no_sheet_is_refused(fitted, squares):
    sheet = fitted.explain(squares[0][:1])
    for wrong in (sheet.drop(columns=["logit", "x0"]), None, fitted):
        with pytest.raises(ValueError, match=r"sheet must be a scoring sheet, .* lacks .*'logit'"):
            style_sheet(fitted, wrong, squares[0][:1])
    with pytest.raises(ValueError, match=r"lacks the columns \['path'\]"):
        style_sheet(fitted, sheet.drop(columns="path"))


def test_names_are_escaped(fitted, squares):
    X, y = squares
    hostile = np.where(y == "red", "<script>alert(1)</script>", y)
    clf = clone(fitted).fit(X, hostile)
    html = style_sheet(clf, clf.explain(X[:6], "all"), X[:6]).to_html()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_an_empty_sheet_has_a_view(fitted, squares):
    assert "contribution" in style_sheet(fitted, fitted.explain(squares[0][:1]).head(0)).to_html()


def test_a_source_that_is_gone_has_no_picture(fitted, squares, tmp_path):
    X, y = squares
    paths = [tmp_path / f"{i}.png" for i in range(len(X))]
    for path, pixels in zip(paths, X, strict=True):
        PIL.Image.fromarray(pixels).save(path)
    clf = clone(fitted).fit(paths, y)
    for path in paths:
        path.unlink()
    sheet = clf.explain(X[:1], top=2)
    assert len(pictures_in(style_sheet(clf, sheet, X[:1]).to_html())) == sheet["prototype"].count()


def test_an_image_that_cannot_be_read_is_no_rest(fitted, squares, tmp_path):
    X, y = squares
    clf = clone(fitted).set_params(on_bad_image="skip").fit(X, y)
    broken, whole = tmp_path / "broken.png", tmp_path / "whole.png"
    broken.write_bytes(b"no picture")
    PIL.Image.fromarray(X[0]).save(whole)
    sheet = clf.explain([broken, whole], "predicted", top=1)
    html = style_sheet(clf, sheet).to_html()
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in html.split("<tr>")[2:]]
    assert rows[0] == ["0", "(unreadable)", *[""] * 8]
    assert rows[-1].count("(rest)") == 4
