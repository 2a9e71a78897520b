"""Pictures hold the numbers that they are drawn from."""

import copy
import unicodedata
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from matplotlib.axes import Axes
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline

from protoclf import ImageError, ProtoPNetClassifier, canvas
from protoclf.editing import remove
from protoclf.nearest_patches import nearest_patches
from protoclf.plotting import (
    plot_explanation,
    plot_history,
    plot_last_layer_path,
    plot_nearest_patches,
    plot_prototypes,
    plot_similarity_maps,
)

BOX = ["x0", "y0", "x1", "y1"]
KOREAN = "붉은머리오목눈이"


@pytest.fixture(autouse=True)
def no_screen():
    """Draw in memory; whatever is drawn changes no setting."""
    from matplotlib import pyplot as plt

    mpl.use("agg")
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    plt.close("all")


@pytest.fixture
def nearest(fitted, squares):
    """The two most similar images for each prototype, as a table."""
    X, y = squares
    return nearest_patches(fitted, X, 2, y)


def texts_of(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def boxes_on(axis):
    """Boxes drawn on axes, (k, 4)."""
    from matplotlib.patches import Rectangle

    patches = [p for p in axis.patches if isinstance(p, Rectangle)]
    return np.unique(
        [(*p.get_xy(), *np.add(p.get_xy(), p.get_bbox().size)) for p in patches], axis=0
    )


# The scoring sheet ------------------------------------------------------------------------------


def test_a_sheet_is_drawn_with_its_maps(fitted, squares, tmp_path):
    image = squares[0][0]
    display = plot_explanation(fitted, image, "all", top=2)
    pd.testing.assert_frame_equal(display.sheet, fitted.explain([image], "all", top=2))
    maps = fitted.similarity_maps([image], upsampled=True)[0]
    for j, heat in display.maps.items():
        np.testing.assert_allclose(heat, maps[j], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(display.sources[j], fitted.source_image(j))
    display.figure_.savefig(tmp_path / "sheet.png")


def test_the_maps_of_a_sheet_say_that_each_has_a_scale_of_its_own(fitted, squares):
    figure = plot_explanation(fitted, squares[0][0], "predicted", top=2).figure_
    heats = [axis.images[1].get_clim() for axis in figure.axes if len(axis.images) == 2]
    assert len(set(heats)) == len(heats) == 2
    assert "least to most similar" in texts_of(figure)


def test_flat_maps_have_one_colour_that_the_scale_shows(squares):
    X, y = squares
    whole = {"prototype_size": "full", "prototypes_per_class": 1, "train_backbone": False}
    clf = ProtoPNetClassifier("small_cnn", image_size=32, random_state=0, verbose=0, **whole)
    prototypes = plot_prototypes(clf.fit(X, y))
    for display in (plot_explanation(clf, X[0], top=2), prototypes):
        heats = [axis.images[1] for axis in display.figure_.findobj(Axes) if axis.images[1:]]
        colours = [heat.norm(heat.get_array()) for heat in heats]
        assert all(values.min() > 0.4 and values.max() < 0.6 for values in colours)
    low, high = prototypes.figure_.axes[-1].get_ylim()
    assert heats[0].get_clim() == pytest.approx((low, high))
    assert high - low < 0.1


def titles(display):
    return [part.texts[0].get_text().split("\n")[0] for part in display.figure_.subfigs]


def test_only_the_second_class_is_the_rival(fitted, squares):
    probability = fitted.predict_proba(squares[0][:1])[0]
    first, second, third = fitted.classes_[np.argsort(-probability)]
    assert titles(plot_explanation(fitted, squares[0][0])) == [
        f"predicted: {first}",
        f"rival: {second}",
    ]
    names = {first: f"predicted: {first}", second: f"rival: {second}", third: third}
    every = plot_explanation(fitted, squares[0][0], "all")
    assert titles(every) == [names[label] for label in fitted.classes_]
    assert titles(plot_explanation(fitted, squares[0][0], [third])) == [third]
    np.testing.assert_allclose(every.verdicts["probability"], probability)


def test_a_class_without_contributions_is_drawn_all_the_same(fitted, squares, tmp_path):
    mute = copy.deepcopy(fitted)
    predicted = mute.predict(squares[0][:1])[0]
    weight = mute.module_.last_layer.weight.data
    weight.fill_(-1)
    weight[mute.classes_.tolist().index(predicted)] = 0
    weight *= 1e3  # so that all other probabilities are 0
    display = plot_explanation(mute, squares[0][0])
    logits = mute.decision_function(squares[0][:1])[0]
    rival = mute.classes_[np.argsort(-logits)[1]]
    assert titles(display) == [f"predicted: {predicted}", f"rival: {rival}"]
    assert len(display.figure_.subfigs[1].axes[0].images)  # which has a sheet
    texts = [t.get_text() for axis in display.figure_.subfigs[0].axes for t in axis.texts]
    assert texts == ["No prototype speaks for or against it."]
    display.figure_.savefig(tmp_path / "sheet.png")


def test_a_part_that_is_unlike_the_other_is_marked(fitted, squares):
    opposed = copy.deepcopy(fitted)
    opposed.module_.prototypes.data.neg_()
    for clf in (fitted, opposed):
        display = plot_explanation(clf, squares[0][0], "all")
        below = (display.sheet["similarity"] < 0).sum()
        assert sum("unlike" in text for text in texts_of(display.figure_)) == below
    assert below  # of the opposed one


def test_no_sheet_is_drawn_of_nothing(fitted, squares, monkeypatch):
    empty = fitted.explain(squares[0][:1]).iloc[:0]
    monkeypatch.setattr(type(fitted), "explain", lambda *_, **__: empty)
    with pytest.raises(ValueError, match="No prototype contributes to classes 'top2'"):
        plot_explanation(fitted, squares[0][0])


# Prototypes -------------------------------------------------------------------------------------


def test_prototypes_are_drawn_class_by_class(fitted, tmp_path):
    display = plot_prototypes(fitted)
    table = fitted.prototypes_
    expected = table.sort_values(["class", "weight"], ascending=[True, False])
    pd.testing.assert_frame_equal(display.table, expected.reset_index(drop=True))
    assert display.axes_.shape == (fitted.n_prototypes_, 3)
    for (_, row), axes in zip(display.table.iterrows(), display.axes_, strict=True):
        j, box = row["prototype"], row[BOX].to_numpy(int)
        source = fitted.source_image(j)
        np.testing.assert_array_equal(display.pictures[j].pixels, source)
        x0, y0, x1, y1 = box
        np.testing.assert_array_equal(display.crops[j].pixels, source[y0:y1, x0:x1])
        heat = fitted.similarity_maps([source], upsampled=True)[0][j]
        np.testing.assert_allclose(display.maps[j].pixels, heat, rtol=1e-5, atol=1e-6)
        assert display.maps[j].box == (10, 0, 50, 40)  # the centred square of 60 x 40 pixels
        np.testing.assert_allclose(boxes_on(axes[0]), [box])
        title = axes[1].get_title()
        assert title == f"prototype {j} of {row['class']}, weight {row['weight']:.2f}"
    display.figure_.savefig(tmp_path / "prototypes.png")


def test_prototypes_are_chosen(fitted):
    table = fitted.prototypes_
    of_class = plot_prototypes(fitted, "green").table
    assert of_class["class"].tolist() == ["green", "green"]
    assert of_class["weight"].is_monotonic_decreasing
    assert plot_prototypes(fitted, prototypes=[4, 0, 4]).table["prototype"].tolist() == [4, 0]
    best = table.loc[table.groupby("class")["weight"].idxmax(), "prototype"].tolist()
    assert plot_prototypes(fitted, top=1).table["prototype"].tolist() == best


def test_many_prototypes_are_limited_unless_asked_for(fitted, monkeypatch):
    monkeypatch.setattr("protoclf.plot_data._MOST", 4)
    display = plot_prototypes(fitted)
    assert len(display.table) == 4
    assert set(display.table["class"]) == set(fitted.classes_)  # the best of each come first
    assert "4 of 6 prototypes: training image, box, similarity" in texts_of(display.figure_)
    assert len(plot_prototypes(fitted, top=2).table) == 6


def test_prototypes_are_drawn_into_a_figure(fitted):
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(12, 4))
    part = figure.subfigures(1, 2)[1]
    display = plot_prototypes(fitted, "red", figure=part)
    assert display.figure_ is part
    assert plt.get_fignums() == [figure.number]
    figure.canvas.draw()
    left = min(axis.get_window_extent().x0 for axis in display.axes_.flat)
    assert left >= figure.bbox.width / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "purple"}, r"label must be one of \['blue', 'green', 'red'\]; got 'purple'"),
        ({"prototypes": [0, 6, -1]}, r"prototypes .* from 0 to 5; got 6, -1"),
        ({"prototypes": []}, r"prototypes must name .* got none"),
        ({"prototypes": [0.5]}, r"prototypes must name .* got 0\.5"),
        ({"label": "red", "prototypes": [0]}, "label or prototypes, not both"),
        ({"top": 0}, "top must be an int >= 1"),
        ({"top": 1.5}, "top must be an int >= 1"),
    ],
)
def test_wrong_choices_are_refused_by_name(fitted, squares, arguments, message):
    with pytest.raises(ValueError, match=message):
        plot_prototypes(fitted, **arguments)
    with pytest.raises(ValueError, match=message):
        plot_similarity_maps(fitted, squares[0][0], **arguments)


def test_an_unfitted_classifier_is_refused(squares):
    for plot in (plot_prototypes, lambda clf: plot_similarity_maps(clf, squares[0][0])):
        with pytest.raises(NotFittedError):
            plot(ProtoPNetClassifier())


# Similarity maps --------------------------------------------------------------------------------


def test_similarity_maps_are_of_the_highest_contributions(fitted, squares, tmp_path):
    image = squares[0][1]
    display = plot_similarity_maps(fitted, image, top=2)
    sheet = fitted.explain([image]).iloc[: len(display.table)]
    assert display.label == sheet["class"].iloc[0]
    columns = ["prototype", "similarity", "weight", "contribution", *BOX]
    for name in columns:
        np.testing.assert_allclose(display.table[name], sheet[name].astype(float), rtol=1e-5)
    maps = fitted.similarity_maps([image], upsampled=True)[0]
    for (_, row), axis in zip(display.table.iterrows(), display.axes_, strict=True):
        j = row["prototype"]
        np.testing.assert_allclose(display.maps[j].pixels, maps[j], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(boxes_on(axis), [row[BOX].to_numpy(float)])
        named = f"prototype {j}\nof {row['class']},\nsimilarity {row['similarity']:.2f}"
        assert axis.get_title() == named
    scales = {axis.images[1].get_clim() for axis in display.axes_}
    assert len(scales) == 1
    display.figure_.savefig(tmp_path / "maps.png")


def test_the_scale_stays_in_the_figure_whatever_its_numbers(fitted, squares):
    display = plot_similarity_maps(fitted, squares[0][0], prototypes=[0])
    pixels, box = display.maps[0]
    display.maps[0] = canvas.View(np.linspace(-0.11, 0.09, pixels.size).reshape(pixels.shape), box)
    figure = display.plot().figure_
    figure.canvas.draw()
    assert "−0.075" in texts_of(figure)
    scale = figure.axes[-1].get_tightbbox(figure.canvas.get_renderer())
    assert scale.x1 <= figure.bbox.width


def test_similarity_maps_do_not_mind_the_output_format(fitted, squares):
    expected = plot_similarity_maps(fitted, squares[0][0]).table
    framed = copy.deepcopy(fitted).set_output(transform="pandas")
    pd.testing.assert_frame_equal(plot_similarity_maps(framed, squares[0][0]).table, expected)


def test_similarity_maps_of_another_class_or_of_given_prototypes(fitted, squares):
    image = squares[0][2]
    sheet = fitted.explain([image], "all")
    label = sheet.loc[~sheet["is_predicted"] & (sheet["contribution"] > 0), "class"].iloc[0]
    other = plot_similarity_maps(fitted, image, label=label)
    assert other.label == label
    sheet = sheet[sheet["class"] == label]
    expected = sheet.loc[sheet["contribution"] > 0, "prototype"].tolist()
    assert other.table["prototype"].tolist() == expected
    given = plot_similarity_maps(fitted, image, prototypes=[5, 0])
    assert given.table["prototype"].tolist() == [5, 0]
    np.testing.assert_allclose(given.table["similarity"], fitted.transform([image])[0, [5, 0]])


def test_similarity_maps_are_drawn_into_axes(fitted, squares):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2)
    display = plot_similarity_maps(fitted, squares[0][0], [1, 2], axes=axes)
    assert display.figure_ is figure
    assert list(display.axes_) == list(axes)
    single = plot_similarity_maps(fitted, squares[0][0], [1], axes=plt.subplots()[1])
    assert len(single.axes_) == 1
    with pytest.raises(ValueError, match="axes must be 3, one for each prototype; got 2"):
        plot_similarity_maps(fitted, squares[0][0], [1, 2, 3], axes=axes)
    assert len(plt.get_fignums()) == 2


def test_a_class_without_contributions_has_no_maps(fitted, squares, monkeypatch):
    monkeypatch.setattr(type(fitted), "coef_", np.zeros((3, 6)))
    with pytest.raises(ValueError, match="No prototype contributes to label 'red'"):
        plot_similarity_maps(fitted, squares[0][0], label="red")


# History ----------------------------------------------------------------------------------------


def history_of(cycles, valid=True):
    rows = [{"stage": "warm-up", "train_loss": 4.0, "valid_loss": 4.1, "valid_acc": 0.2}]
    for _ in range(cycles):
        rows += [{"stage": "joint", "train_loss": 3.0, "valid_loss": 3.1, "valid_acc": 0.4}] * 3
        rows += [{"stage": "projection", "distinct_patches": 6, "train_loss": 2.5}]
        rows += [{"stage": "last layer", "objective": 0.5, "train_loss": 1.0, "valid_acc": 0.7}]
    keys = ("valid_loss", "valid_acc")
    return rows if valid else [{k: v for k, v in r.items() if k not in keys} for r in rows]


def test_the_history_of_a_fit_is_drawn(fitted, tmp_path):
    display = plot_history(fitted)
    assert display.table["stage"].tolist() == [row["stage"] for row in fitted.history]
    losses = [row["train_loss"] for row in fitted.history]
    np.testing.assert_allclose(display.table["train_loss"], losses)
    (axes,) = display.axes_  # no validation, no accuracy
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), losses)
    pd.testing.assert_frame_equal(plot_history(fitted.history).table, display.table)
    display.figure_.savefig(tmp_path / "history.png")


def test_stages_and_lines_are_told_apart_without_colour(tmp_path):
    display = plot_history(history_of(cycles=2))
    loss, accuracy = display.axes_
    lines = [*loss.get_lines()[:2], accuracy.get_lines()[0]]
    assert len({line.get_linestyle() for line in lines}) == 3
    np.testing.assert_allclose(lines[2].get_ydata()[[0, 4, 5]], [0.2, np.nan, 0.7])
    assert [text.get_text() for text in loss.texts] == ["warm-up", "joint", "joint"]
    (legend,) = display.figure_.legends
    named = [text.get_text() for text in legend.get_texts()]
    losses = ["training loss", "validation loss", "validation accuracy (right)"]
    assert named == [*losses, "projection", "last layer"]
    display.figure_.savefig(tmp_path / "history.png")


def test_curves_stand_out_on_a_dark_style(fitted, squares):
    from matplotlib import pyplot as plt
    from matplotlib.colors import to_rgb

    with plt.style.context("dark_background"):
        history = plot_history(history_of(cycles=1))
        path = plot_last_layer_path(fitted.last_layer_path(*squares, [1e-2, 1e-3], folds=2))
        history.figure_.canvas.draw()
    for axes in (history.axes_[0], path.axes_[0]):
        assert axes.get_lines()
        for line in axes.get_lines():
            assert max(to_rgb(line.get_color())) > 0.5
    name, band = history.axes_[0].texts[0], history.axes_[0].patches[0]
    assert max(to_rgb(name.get_color())) > 0.5
    assert band.get_alpha() < 0.2


def test_bands_without_room_are_named_in_the_legend():
    display = plot_history(history_of(cycles=30))
    assert len(display.axes_[0].patches) == 31
    assert [text.get_text() for text in display.axes_[0].texts] == []
    named = [text.get_text() for text in display.figure_.legends[0].get_texts()]
    assert named[-2:] == ["warm-up", "joint"]


def test_a_history_may_lack_stages_and_values():
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots()
    rows = [{"train_loss": np.nan}, {}, {"train_loss": 2.0, "valid_loss": None}]
    display = plot_history(rows, axes)
    assert display.figure_ is figure
    assert plt.get_fignums() == [figure.number]
    np.testing.assert_allclose(display.table["train_loss"], [np.nan, np.nan, 2.0])
    assert display.table["valid_loss"].isna().all()
    figure.canvas.draw()


@pytest.mark.parametrize("nothing", [[], ProtoPNetClassifier(), None])
def test_no_history_is_refused(nothing):
    with pytest.raises(ValueError, match="clf_or_history must hold a row at least"):
        plot_history(nothing)


def test_a_history_without_losses_is_refused():
    with pytest.raises(ValueError, match="clf_or_history has no loss"):
        plot_history([{"stage": "joint", "valid_acc": 0.5}])


@pytest.mark.parametrize("wrong", [None, [{"lambda_l1": 1e-3}], pd.DataFrame({"lambda_l1": [1]})])
def test_what_is_no_path_of_the_penalty_is_refused(wrong):
    with pytest.raises(ValueError, match=r"path must be the table of .* it lacks the columns"):
        plot_last_layer_path(wrong)


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
    with_none = fitted.last_layer_path(*squares, [1e-2, 1e-3, 0], folds=2)
    axes = plot_last_layer_path(with_none).axes_[0]
    low, high = axes.transAxes.inverted().transform(axes.transData.transform([(0, 1), (1e-2, 1)]))
    assert 0 <= low[0] < high[0] <= 1
    figure, axes = plt.subplots()
    assert plot_last_layer_path(path, axes).figure_ is figure


# Nearest patches --------------------------------------------------------------------------------


def test_nearest_patches_are_drawn_beside_their_prototypes(fitted, squares, nearest, tmp_path):
    X, _ = squares
    display = plot_nearest_patches(nearest, fitted, X)
    assert display.axes_.shape == (6, 3)
    agrees = nearest["label"] == nearest["class"]
    assert display.table["agrees"].tolist() == agrees.tolist()
    for i, row in nearest.iterrows():
        pixels, (x0, y0, x1, y1) = display.views[i]
        np.testing.assert_array_equal(pixels, X[row["sample"]][y0:y1, x0:x1])
        assert x0 <= row["x0"] < row["x1"] <= x1
        assert y0 <= row["y0"] < row["y1"] <= y1
        axis = display.axes_[row["prototype"], row["rank"]]
        np.testing.assert_allclose(boxes_on(axis), [row[BOX].to_numpy(float)])
        sign, style = ("✓", "-") if agrees[i] else ("✗", "--")
        assert axis.texts[0].get_text() == f"{row['similarity']:.2f}\n{sign} {row['label']}"
        assert axis.spines["left"].get_linestyle() == style
    pd.testing.assert_frame_equal(display.sources, fitted.prototypes_)
    display.figure_.savefig(tmp_path / "nearest.png")


def test_nearest_patches_are_chosen(fitted, squares, nearest):
    display = plot_nearest_patches(nearest, fitted, squares[0], prototypes=[3, 1], top=1)
    assert any("2 of 6 prototypes:  ✓ of its class" in text for text in texts_of(display.figure_))
    assert display.table["prototype"].tolist() == [3, 1]
    assert display.sources["prototype"].tolist() == [3, 1]
    assert display.axes_.shape == (2, 2)
    alone = plot_nearest_patches(nearest.drop(columns="label"), X=squares[0])
    assert alone.sources is None
    assert alone.table["agrees"].isna().all()
    assert not any(sign in text for text in texts_of(alone.figure_) for sign in "✓✗")
    assert "6 of 6 prototypes:  nearest patches" in texts_of(alone.figure_)


def test_a_large_table_is_drawn_with_some_patches_of_each_class(squares, nearest):
    classes = [0] * 60 + [1] * 3 + [2] * 2
    rows = nearest.iloc[[0] * 65].assign(prototype=range(65), **{"class": classes})
    display = plot_nearest_patches(rows, X=squares[0])
    assert display.table["prototype"].tolist() == [0, 1, 2, 3, 60, 61, 62, 63, 64]
    rows["class"] = rows["prototype"] // 2  # 33 classes: two of the first ones
    table = plot_nearest_patches(rows, X=squares[0]).table
    assert len(table) == 40
    assert table["class"].tolist() == sorted([*range(33), *range(7)])


def test_labels_may_be_missing_for_some_images(squares, nearest):
    nearest["label"] = nearest["label"].where(nearest["rank"] == 1, None)
    display = plot_nearest_patches(nearest, X=squares[0])
    assert display.table["agrees"].isna().tolist() == [False, True] * 6


def test_nearest_patches_are_read_from_their_paths(squares, nearest, tmp_path):
    for i in nearest["sample"].unique():
        PIL.Image.fromarray(squares[0][i]).save(tmp_path / f"{i}.png")
    from_arrays = plot_nearest_patches(nearest, X=squares[0])
    nearest["path"] = [str(tmp_path / f"{i}.png") for i in nearest["sample"]]
    from_paths = plot_nearest_patches(nearest)
    for a, b in zip(from_arrays.views, from_paths.views, strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)


def test_wrong_tables_are_refused_by_name(fitted, squares, nearest):
    X, _ = squares
    with pytest.raises(ValueError, match=r"table .* lacks the columns \['similarity'\]"):
        plot_nearest_patches(nearest.drop(columns="similarity"), X=X)
    with pytest.raises(ValueError, match=r"table .* nearest_patches\(clf, X\); it lacks"):
        plot_nearest_patches(fitted, X=X)
    with pytest.raises(ValueError, match="table must hold a row"):
        plot_nearest_patches(nearest.iloc[:0], X=X)
    with pytest.raises(ValueError, match=r"prototypes .* that the table has.* got 9"):
        plot_nearest_patches(nearest, X=X, prototypes=[9])
    with pytest.raises(ValueError, match="X must be given"):
        plot_nearest_patches(nearest)
    with pytest.raises(ValueError, match="X must be the images that the table counts; it has 1"):
        plot_nearest_patches(nearest, X=X[:1])
    with pytest.raises(ValueError, match="table must name prototypes that the classifier has"):
        plot_nearest_patches(nearest.assign(prototype=nearest["prototype"] + 6), fitted, X)
    with pytest.raises(ValueError, match="top must be an int"):
        plot_nearest_patches(nearest, X=X, top=0)
    with pytest.raises(ValueError, match="No row of the table has a rank up to top=1"):
        plot_nearest_patches(nearest[nearest["rank"] > 1], X=X, top=1)
    with pytest.raises(ValueError, match="The table was made with another classifier"):
        plot_nearest_patches(nearest, remove(fitted, [0]), X, prototypes=[1])


def test_similarity_maps_of_an_unreadable_image_name_it(fitted, tmp_path):
    skips = copy.deepcopy(fitted).set_params(on_bad_image="skip")
    with pytest.raises(ImageError, match=r"no\.png"):
        plot_similarity_maps(skips, tmp_path / "no.png")


# The canvas -------------------------------------------------------------------------------------


def test_views_of_large_images_are_reduced_and_cover_the_same_box():
    image = np.zeros((1500, 2000, 3), np.uint8)
    image[300:600, 400:1400] = 255
    whole = canvas.view(image)
    assert whole.pixels.shape == (450, 600, 3)
    assert whole.box == (0, 0, 2000, 1500)
    cut = canvas.view(image, (400, 300, 1400, 600))
    assert cut.pixels.shape == (180, 600, 3)
    assert (cut.pixels == 255).all()


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((20, 10, 30, 14), (15, 2, 35, 22)),  # in the middle
        ((0, 0, 10, 10), (0, 0, 20, 20)),  # moved into the image
        ((50, 35, 60, 40), (40, 20, 60, 40)),
        ((0, 0, 60, 40), (0, 0, 60, 40)),  # no more than the image
    ],
)
def test_surroundings_stay_in_the_image(squares, box, expected):
    image = squares[0][0]
    assert canvas.surroundings(image, box).box == expected


def test_pictures_are_upright_whatever_the_style(fitted, squares):
    from matplotlib import pyplot as plt

    with plt.rc_context({"image.origin": "lower"}):
        explanation = plot_explanation(fitted, squares[0][0], top=1).figure_
        prototypes = plot_prototypes(fitted, prototypes=[0]).figure_
    images = [image for axes in explanation.axes + prototypes.axes for image in axes.images]
    assert len(images) >= 8
    assert {image.origin for image in images} == {"upper"}


@pytest.mark.parametrize("name", ["figure.constrained_layout.use", "figure.autolayout"])
def test_tiles_stay_in_their_places_whatever_the_style(name, fitted):
    from matplotlib import pyplot as plt

    expected = plot_prototypes(fitted, prototypes=[0])
    with plt.rc_context({name: True}):
        display = plot_prototypes(fitted, prototypes=[0])
        display.figure_.canvas.draw()
    expected.figure_.canvas.draw()
    for axes, other in zip(display.figure_.axes, expected.figure_.axes, strict=True):
        np.testing.assert_allclose(axes.get_position().bounds, other.get_position().bounds)


def drawn_boxes(figure):
    """Extents of all titles, and of what stands in the axes, in pixels."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [*[part.texts[0] for part in figure.subfigs]]
    for axis in [axis for part in figure.subfigs for axis in part.axes]:
        titles = axis.title, axis._left_title
        texts += [text for text in (*titles, *axis.texts) if text.get_text()]
    images = [axis.images[0] for part in figure.subfigs for axis in part.axes if axis.images]
    return [artist.get_window_extent(renderer) for artist in (*texts, *images)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layout", ["none", "constrained"])
@pytest.mark.parametrize("size", [(14, 9), (6.4, 4.8), (16, 2), (2, 1.5), (2, 1)])
@pytest.mark.parametrize("plot", ["explanation", "prototypes", "nearest patches"])
def test_nothing_overlaps_in_a_figure_of_the_callers(fitted, squares, nearest, layout, size, plot):
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=size, layout=layout)
    if plot == "explanation":
        plot_explanation(fitted, squares[0][0], top=2, figure=figure)
        least = 2 * (1 + 3 + 2 * 4)
    elif plot == "prototypes":
        least = 1 + 4 * len(plot_prototypes(fitted, figure=figure).table)
    else:
        table = plot_nearest_patches(nearest, fitted, squares[0], figure=figure).table
        least = 1 + 2 * len(table)
    boxes = drawn_boxes(figure)
    assert len(boxes) >= least
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_long_names_are_shortened_and_dollars_are_no_formulas():
    assert canvas.short("sparrow") == "sparrow"
    long = canvas.short("a_bird_whose_name_is_much_too_long", 20)
    assert (len(long), long[:3], long[-3:]) == (19, "a_b", "ong")
    assert canvas.short(KOREAN * 3, 20) == "붉은머리오…오목눈이"  # wide letters count twice
    assert canvas.short(unicodedata.normalize("NFD", KOREAN)) == KOREAN
    assert canvas.short("$a$\nb") == r"\$a\$ b"
    assert canvas.short(3.0) == "3"


def korean_history():
    return [{"stage": KOREAN, "train_loss": 1.0}, {"stage": KOREAN, "train_loss": 0.5}]


def test_letters_of_any_script_are_drawn_whenever_the_figure_is_saved(tmp_path):
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    if not installed & set(canvas._FALLBACK_FONTS) - {"DejaVu Sans"}:
        pytest.skip("matplotlib knows of no font with Korean letters")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        display = plot_history(korean_history())
        display.figure_.savefig(tmp_path / "later.png")
    assert display.axes_[0].texts[0].get_text() == KOREAN


def test_letters_that_no_font_has_give_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(canvas, "_FALLBACK_FONTS", ("DejaVu Sans",))
    with pytest.warns(UserWarning, match="No font has the letters .*fonts-nanum") as caught:
        display = plot_history(korean_history())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        display.figure_.savefig(tmp_path / "later.png")
    assert display.axes_[0].texts[0].get_text() == "?" * len(KOREAN)


def test_text_that_others_drew_stays_as_it_is(monkeypatch):
    from matplotlib import pyplot as plt

    monkeypatch.setattr(canvas, "_FALLBACK_FONTS", ())
    _, axes = plt.subplots()
    axes.set_title(KOREAN)
    plot_history(history_of(cycles=1), axes)
    assert axes.get_title() == KOREAN


def test_an_explanation_is_drawn_with_the_boxes_that_were_asked_for(fitted, squares):
    how = {"attribution": "gradient", "percentile": 90}
    display = plot_explanation(fitted, squares[0][0], top=2, **how)
    expected = fitted.explain(squares[0][:1], "top2", 2, **how)
    pd.testing.assert_frame_equal(display.sheet, expected)


def test_a_history_is_looked_for_in_a_classifier_alone(fitted):
    with pytest.raises(TypeError, match="last step of a pipeline"):
        plot_history(make_pipeline("passthrough", fitted))


@pytest.mark.parametrize("draw", [plot_explanation, plot_similarity_maps])
def test_several_images_in_the_place_of_one_are_refused(fitted, squares, draw):
    with pytest.raises(ImageError, match=r"got a list of 2. Draw them one by one, image=X\[0\]"):
        draw(fitted, list(squares[0][:2]))
    with pytest.raises(ImageError, match=r"image must be one image; got a ndarray of 2. Draw"):
        draw(fitted, squares[0][:2])
