"""The scoring sheet and the table of prototypes, against loops over the module's outputs."""

import copy
import math

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from protoclf import ProtoPNetClassifier, explanation
from protoclf.explanation import BOX, REST, SHEET_COLUMNS, chosen_classes
from protoclf.image_dataset import ImageDataset
from protoclf.images import Images

SIZE = (60, 40)  # width and height of the pictures
CHOICES = ["predicted", "top2", "all", ["red"], ["green", "blue"]]


@pytest.fixture(scope="module")
def image_paths(squares, tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    paths = [folder / f"{i}.png" for i in range(len(squares[0]))]
    for path, pixels in zip(paths, squares[0], strict=True):
        PIL.Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture(scope="module")
def fitted_on_paths(squares, image_paths):
    """Unlike `fitted`: squashed images, patches of 2 x 3 cells, "log", every weight non-zero."""
    clf = ProtoPNetClassifier(
        "small_cnn",
        image_size=40,
        resize="squash",
        prototypes_per_class={"blue": 1, "green": 3, "red": 2},
        prototype_size=(2, 3),
        latent_dim=16,
        similarity="log",
        distinct="images",
        warmup_epochs=1,
        joint_epochs=1,
        lambda_l1=1e-5,
        batch_size=8,
        random_state=0,
        verbose=0,
    )
    return clf.fit(image_paths, squares[1])


@pytest.fixture(params=["crop, cosine", "squash, log"])
def case(request, squares):
    """A classifier, images and what the sheet names them by."""
    if request.param == "squash, log":
        paths = request.getfixturevalue("image_paths")[:10]
        return request.getfixturevalue("fitted_on_paths"), paths, [str(p) for p in paths]
    return request.getfixturevalue("fitted"), squares[0][:10], [None] * 10


def box_in_original(clf, box):
    """Pixels of the original that contain a box of the model input."""
    width, height = SIZE
    if clf.resize == "crop":
        left, top, side_x, side_y = 10, 0, 40, 40
    else:
        left, top, side_x, side_y = 0, 0, width, height
    x0, y0, x1, y1 = box
    scale_x, scale_y = side_x / clf.image_size, side_y / clf.image_size
    return [
        max(math.floor(left + x0 * scale_x + 1e-6), 0),
        max(math.floor(top + y0 * scale_y + 1e-6), 0),
        min(math.ceil(left + x1 * scale_x - 1e-6), width),
        min(math.ceil(top + y1 * scale_y - 1e-6), height),
    ]


def high_activation_box(clf, patch_map):
    """The paper's box: bicubic upsampling, pixels of the 95th percentile and above."""
    rows, cols = clf.module_.prototype_size
    cells = torch.full((patch_map.shape[0] + rows - 1, patch_map.shape[1] + cols - 1), -torch.inf)
    for y, x in np.ndindex(*patch_map.shape):
        for dy, dx in np.ndindex(rows, cols):
            cells[y + dy, x + dx] = max(cells[y + dy, x + dx], patch_map[y, x])
    cells = (cells - cells.min())[None, None]
    side = (clf.image_size, clf.image_size)
    pixels = F.interpolate(cells, side, mode="bicubic", align_corners=False)[0, 0].numpy()
    threshold = np.percentile(pixels, 95, method="higher") - 1e-5 * pixels.max()
    high_y, high_x = np.nonzero(pixels >= threshold)
    return [high_x.min(), high_y.min(), high_x.max() + 1, high_y.max() + 1]


@torch.no_grad()
def loop_sheet(clf, X, names, classes):
    """Every row that the sheet should have, as dicts, in order."""
    module, labels, table = clf.module_.eval(), clf.classes_.tolist(), clf.prototypes_
    dataset, rows = ImageDataset(Images(X), clf.preprocessing_), []
    for i in range(len(X)):
        z = module.latents(module.features(dataset.__getitems__([i])[0]["images"]))
        maps, logits = module.similarity_maps(z)[0], module.compare(z)[0][0]
        probability = logits.softmax(0).tolist()
        by_logit = sorted(range(len(labels)), key=lambda c: -logits[c].item())
        if classes in ("predicted", "top2", "all"):
            chosen = by_logit[: {"predicted": 1, "top2": 2, "all": None}[classes]]
        else:
            chosen = [c for c in by_logit if labels[c] in classes]
        for c in chosen:
            of_class = []
            for j in range(len(maps)):
                similarity, weight = maps[j].max().item(), clf.coef_[c, j].item()
                if similarity * weight == 0:
                    continue
                row, col = divmod(int(maps[j].argmax()), maps.shape[2])
                box = box_in_original(clf, high_activation_box(clf, maps[j]))
                made = {"sample": i, "path": names[i], "class": labels[c]}
                made |= {"is_predicted": c == by_logit[0], "logit": logits[c].item()}
                made |= {"probability": probability[c], "prototype": j}
                made |= {"prototype_class": labels[int(module.owner[j])]}
                made |= {"similarity": similarity, "weight": weight}
                made |= {"contribution": similarity * weight, "row": row, "col": col}
                made |= dict(zip(BOX, box, strict=True))
                source = table[table["prototype"] == j].iloc[0]
                made |= {"source": source["source"], "source_index": source["source_index"]}
                made |= {"source_class": source["class"]}
                of_class.append(made | {f"source_{side}": source[side] for side in BOX})
            of_class.sort(key=lambda made: (-made["contribution"], made["prototype"]))
            rows += [made | {"rank": k + 1} for k, made in enumerate(of_class)]
    return rows


@pytest.mark.parametrize("classes", CHOICES, ids=str)
def test_every_row_of_the_sheet_is_that_of_loops(case, classes):
    clf, X, names = case
    sheet = clf.explain(X, classes)
    expected = loop_sheet(clf, X, names, classes)
    assert list(sheet.columns) == SHEET_COLUMNS
    assert len(sheet) == len(expected)
    for row, wanted in zip(sheet.to_dict("records"), expected, strict=True):
        for name, value in wanted.items():
            if isinstance(value, float):
                assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
            else:
                assert row[name] == value, name


@pytest.mark.parametrize("top", [None, 1, 2, 100])
@pytest.mark.parametrize("classes", CHOICES, ids=str)
def test_contributions_of_a_sample_and_class_sum_to_its_logit(case, classes, top):
    clf, X, _ = case
    sheet, logits = clf.explain(X, classes, top), clf.decision_function(X)
    probabilities, predictions = clf.predict_proba(X), clf.predict(X)
    groups = sheet.groupby(["sample", "class"])
    assert len(groups) >= len(X)
    for (i, label), rows in groups:
        c = clf.classes_.tolist().index(label)
        assert rows["contribution"].sum() == pytest.approx(logits[i, c], rel=1e-5, abs=1e-4)
        np.testing.assert_allclose(rows["logit"], logits[i, c], rtol=1e-5)
        np.testing.assert_allclose(rows["probability"], probabilities[i, c], rtol=1e-4)
        assert set(rows["is_predicted"]) == {label == predictions[i]}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["red", "purple"], r"got the unknown 'purple'. Known are 'blue', 'green', 'red'\."),
        ([], "got none. Known are"),
        ("purple", "got the unknown"),
    ],
)
def test_unknown_classes_are_refused(fitted, squares, classes, message):
    with pytest.raises(ValueError, match=message):
        fitted.explain(squares[0][:1], classes)


@pytest.mark.parametrize("top", [0, -1, 1.5, "all"])
def test_wrong_top_is_refused(fitted, squares, top):
    with pytest.raises(ValueError, match="top must be an int >= 1, or None; got"):
        fitted.explain(squares[0][:1], top=top)


def test_a_label_named_twice_is_explained_once(fitted, squares):
    once = fitted.explain(squares[0][:3], ["red"])
    assert fitted.explain(squares[0][:3], ["red", "red"]).equals(once)
    assert fitted.explain(squares[0][:3], "red").equals(once)


def test_a_column_of_labels_is_explained_as_labels(fitted, squares):
    labels = ["red", "blue"]
    expected = fitted.explain(squares[0][:3], labels)
    for column in (pd.DataFrame({"label": labels}), np.array(labels)[:, None], [labels]):
        assert fitted.explain(squares[0][:3], column).equals(expected)
    with pytest.raises(ValueError, match="got the unknown 'purple'"):
        fitted.explain(squares[0][:3], [["red"], ["purple"]])


@pytest.mark.parametrize("top", [1, 2, 3])
def test_a_truncated_sheet_keeps_the_highest_and_sums_up_the_rest(case, top):
    clf, X, _ = case
    full, short = clf.explain(X, "all"), clf.explain(X, "all", top)
    groups = short.groupby(["sample", "class"], sort=False)
    whole = dict(list(full.groupby(["sample", "class"])))
    assert list(groups.groups) == list(full.groupby(["sample", "class"], sort=False).groups)
    for key, rows in groups:
        all_rows = whole[key]
        kept = rows[rows["source"] != REST]
        assert len(kept) == min(top, len(all_rows))
        same = all_rows.head(top).reset_index(drop=True)
        assert (kept.reset_index(drop=True).drop(columns="path") == same.drop(columns="path")).all(
            axis=None
        )
        rest = rows[rows["source"] == REST]
        assert len(rest) == (len(all_rows) > top)
        if len(rest):
            last = rows.iloc[-1]
            assert last["source"] == REST
            assert last["rank"] == top + 1
            assert last["contribution"] == pytest.approx(all_rows["contribution"][top:].sum())
            empty = ["prototype", "prototype_class", "similarity", "weight", "row", "col"]
            empty += [*BOX, "source_index", "source_class", *(f"source_{side}" for side in BOX)]
            assert last[empty].isna().all()


@pytest.mark.parametrize("top", [None, 1, 2])
def test_boxes_are_found_for_the_rows_that_a_sheet_shows_alone(fitted, squares, monkeypatch, top):
    pairs, find = [], explanation.pair_boxes

    def counted(module, z, sample, *others):
        pairs.append(len(sample))
        return find(module, z, sample, *others)

    monkeypatch.setattr(explanation, "pair_boxes", counted)
    sheet = fitted.explain(squares[0], "top2", top)
    assert sum(pairs) == sheet["prototype"].notna().sum()


def test_truncation_leaves_whole_numbers_whole(fitted, squares):
    short = fitted.explain(squares[0][:4], "all", top=1)
    assert REST in set(short["source"])
    for name in ("prototype", "row", "col", *BOX, "source_index"):
        assert short[name].dtype == "Int64"


def test_paths_and_arrays_of_the_same_pictures_give_the_same_sheet(fitted, squares, image_paths):
    of_arrays = fitted.explain(squares[0][:10], "all")
    of_paths = fitted.explain(image_paths[:10], "all")
    assert of_arrays["path"].isna().all()
    assert of_paths["path"].tolist() == [str(image_paths[i]) for i in of_paths["sample"]]
    assert of_arrays.drop(columns="path").equals(of_paths.drop(columns="path"))


def test_sheet_does_not_depend_on_the_batch_size(fitted, squares):
    expected = fitted.explain(squares[0], "top2")
    for size in (1, 5, 24):
        sheet = fitted.set_params(batch_size=size).explain(squares[0], "top2")
        close = ["logit", "probability", "similarity", "contribution"]
        assert sheet.drop(columns=close).equals(expected.drop(columns=close))
        np.testing.assert_allclose(sheet[close], expected[close], rtol=1e-4, atol=1e-6)
    fitted.set_params(batch_size=8)


def test_batches_without_rows_leave_the_types_of_the_sheet(fitted_on_paths, image_paths):
    clf = copy.deepcopy(fitted_on_paths)
    before = clf.explain(image_paths)
    with torch.no_grad():
        clf.module_.last_layer.weight.zero_()
    sheet = clf.explain(image_paths)
    assert sheet.empty
    pd.testing.assert_series_equal(sheet.dtypes, before.dtypes)


def test_prototype_table_names_sources_by_path_or_by_position(
    fitted, fitted_on_paths, squares, image_paths
):
    for clf, names in ((fitted, [*map(str, range(24))]), (fitted_on_paths, image_paths)):
        table = clf.prototypes_
        assert table["prototype"].tolist() == list(range(6))
        assert table["class"].tolist() == clf.classes_[clf.module_.owner.numpy()].tolist()
        assert squares[1][table["source_index"]].tolist() == table["class"].tolist()
        assert table["source"].tolist() == [str(names[i]) for i in table["source_index"]]
    assert fitted_on_paths.prototypes_["class"].tolist() == ["blue"] + ["green"] * 3 + ["red"] * 2


@torch.no_grad()
def test_prototype_table_is_that_of_loops(fitted, fitted_on_paths, squares):
    for clf in (fitted, fitted_on_paths):
        dataset = ImageDataset(Images(squares[0]), clf.preprocessing_)
        module, g = clf.module_, clf.transform(squares[0])
        strongest = [max(range(6), key=list(values).__getitem__) for values in g]
        for row in clf.prototypes_.to_dict("records"):
            j = row["prototype"]
            image = dataset.__getitems__([row["source_index"]])[0]["images"]
            z = module.latents(module.features(image))
            patch_map = module.similarity_maps(z)[0, j]
            assert divmod(int(patch_map.argmax()), patch_map.shape[1]) == (row["row"], row["col"])
            box = box_in_original(clf, high_activation_box(clf, patch_map))
            assert [row[side] for side in BOX] == box
            assert row["weight"] == clf.coef_[int(module.owner[j]), j]
            assert row["strongest_share"] == pytest.approx(strongest.count(j) / 24)
            assert row["moved"] >= 0


@pytest.mark.parametrize("n_classes", [2, 3, 10, 40])
def test_of_equal_logits_the_top_two_are_those_that_prediction_names_first(n_classes):
    logits = torch.zeros(2, n_classes)
    logits[1, 1] = 1
    chosen = chosen_classes(logits, "top2")
    assert chosen.tolist() == [[0, 1], [1, 0]]
    assert chosen_classes(logits, "predicted").tolist() == [[0], [1]]
