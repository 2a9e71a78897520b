"""Settings and data at the edge of what makes sense work, or are refused by name."""

import warnings

import numpy as np
import PIL.Image
import pytest
import torch

from protoclf import ImageError, ProtoPNetClassifier
from protoclf.prototype_layer import min_distances, own_class_distances, similarity


def small(**given):
    settings = {
        "image_size": 24,
        "prototypes_per_class": 2,
        "joint_epochs": 1,
        "batch_size": 8,
        "random_state": 0,
        "verbose": 0,
    }
    return ProtoPNetClassifier("small_cnn", **settings | given)


def assert_sound(clf, X):
    """What must hold of every fitted classifier."""
    logits, sheet = clf.decision_function(X), clf.explain(X, "all")
    assert np.isfinite(logits).all()
    assert np.isfinite(clf.predict_proba(X)).all()
    codes = np.searchsorted(clf.classes_, sheet["class"].to_numpy())
    totals = np.zeros((len(X), len(clf.classes_)))
    np.add.at(totals, (sheet["sample"].to_numpy(), codes), sheet["contribution"].to_numpy())
    margins = totals if logits.ndim == 2 else totals[:, 1] - totals[:, 0]
    np.testing.assert_allclose(margins, logits, atol=1e-3, rtol=1e-4)
    assert clf.last_layer_result_.residual <= 1e-5


@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
@pytest.mark.parametrize("similarity", ["cosine", "log"])
@pytest.mark.parametrize(
    "given",
    [
        {"lambda_clst": 0, "lambda_sep": 0, "lambda_l1": 0, "lambda_l2": 0},
        {"lambda_l1": 0},
        {"lambda_clst": 1e3},
        {"lambda_sep": 1e3},
        {"lambda_l1": 1e3},
        {"lambda_l2": 1e3},
        {"prototypes_per_class": 1},
        {"prototype_size": "full"},
        {"batch_size": 1},
        {"batch_size": 10_000},
        {"lr": 0, "backbone_lr": 0},
        {"joint_epochs": 0, "warmup_epochs": 0},
    ],
    ids=str,
)
def test_extreme_settings_work(squares, given, similarity):
    X, y = squares
    clf = small(similarity=similarity, **given).fit(X, y)
    assert_sound(clf, X)


def test_a_penalty_that_leaves_no_weights_is_told_of_once(squares):
    X, y = squares
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        clf = small(lambda_l1=1e3, cycles=2).fit(X, y)
    (one,) = [w for w in told if "leaves no weight for the classes 'blue'" in str(w.message)]
    assert one.filename == __file__
    assert (clf.coef_ == 0).all()
    assert clf.explain(X).empty
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(lambda_l1=1e-4).fit(X, y)


def test_more_prototypes_than_patches_of_a_class_are_refused(squares):
    with pytest.raises(ValueError, match="'blue' has 72 for 500 prototypes"):
        small(prototypes_per_class=500).fit(*squares)


@pytest.mark.slow
def test_a_thousand_classes():
    rng = np.random.default_rng(0)
    patterns = rng.integers(40, 216, (1000, 8, 8, 3))
    y = np.arange(2000) // 2
    X = (patterns[y] + rng.integers(-30, 30, (2000, 8, 8, 3))).astype(np.uint8)
    torch.manual_seed(0)
    backbone = torch.nn.Conv2d(3, 16, 4, 4)
    clf = ProtoPNetClassifier(
        backbone,
        image_size=8,
        prototypes_per_class=1,
        train_backbone=False,
        lambda_l1=1e-5,
        random_state=0,
        verbose=0,
    ).fit(X, y)
    assert len(clf.classes_) == 1000
    assert clf.coef_.shape == (1000, 1000)
    assert clf.score(X, y) > 0.3
    assert len(clf.explain(X[:3], "top2")["class"].unique()) >= 2


@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
@pytest.mark.parametrize("side", [1, 2, 7])
def test_images_of_a_few_pixels(side, tmp_path):
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (12, side, side, 3), dtype=np.uint8)
    y = np.repeat(["dark", "light"], 6)
    X[:6] //= 4
    clf = small().fit(X, y)
    assert_sound(clf, X)
    boxes = clf.explain(X)[["x0", "y0", "x1", "y1"]].to_numpy(float)
    assert (boxes >= 0).all()
    assert (boxes <= side).all()


def test_an_image_of_8000_pixels(squares, tmp_path):
    clf = small().fit(*squares)
    path = tmp_path / "large.jpg"
    PIL.Image.fromarray(squares[0][0]).resize((8000, 6000)).save(path)
    sheet = clf.explain([path])
    assert sheet["x1"].max() <= 8000
    assert sheet["y1"].max() <= 6000
    assert sheet["x1"].max() > 1000


def test_an_image_that_is_a_bomb_is_refused(squares, tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    path = tmp_path / "bomb.png"
    PIL.Image.new("L", (100, 100)).save(path)
    with pytest.raises(ImageError, match=r"bomb\.png"):
        small().fit([path] * 8, np.repeat([0, 1], 4))


@pytest.mark.parametrize("shape", [(1, 5000, 3), (5000, 1, 3)])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_images_of_one_line(shape, resize):
    X = np.random.default_rng(0).integers(0, 256, (8, *shape), dtype=np.uint8)
    assert_sound(small(resize=resize).fit(X, np.repeat([0, 1], 4)), X)


@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
def test_images_that_are_all_the_same():
    X = np.full((8, 24, 24, 3), 90, np.uint8)
    clf = small().fit(X, np.repeat(["a", "b"], 4))
    assert_sound(clf, X)
    np.testing.assert_allclose(clf.predict_proba(X), 0.5, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_half_precision_makes_no_distance_negative_and_no_logarithm_infinite(dtype, scale):
    z = (torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    p = z[0, :, :2, 1:2].permute(1, 0, 2)[:, :, :, None].contiguous()  # two of its patches
    for distance in (min_distances(z, p)[0], own_class_distances(z, p.expand(3, *p.shape), 1)[0]):
        assert (distance >= 0).all()
        assert distance.isfinite().all()
        assert similarity(distance, "log").isfinite().all()
    assert (min_distances(z, p)[0][0] <= 1e-3 * scale**2).all()  # the patches themselves
    with torch.autocast("cpu", torch.bfloat16):
        distance = min_distances(z.float(), p.float())[0]
    assert (distance >= 0).all()
    assert similarity(distance, "log").isfinite().all()


@pytest.mark.parametrize("given", [{}, {"latent_dim": 8, "similarity": "log"}], ids=str)
def test_under_autocast_all_is_as_without(squares, tmp_path, given):
    X, y = squares
    plain = small(**given).fit(X, y)
    caching = small(memory=tmp_path, train_backbone=False, precision="float32", **given)
    with torch.autocast("cpu", torch.bfloat16):
        within = small(**given).fit(X, y)
        caching.fit(X, y)
        np.testing.assert_array_equal(within.decision_function(X), plain.decision_function(X))
        for attribution in ("upsampled", "gradient"):
            sheet = within.explain(X[:3], attribution=attribution)
            assert sheet.equals(plain.explain(X[:3], attribution=attribution))
    assert within.prototypes_.equals(plain.prototypes_)
    stored = (tmp_path / "protoclf-cache" / "features").rglob("*.npy")
    assert {np.load(file).dtype.name for file in stored} == {"float32"}


def test_another_default_device_changes_nothing(squares, tmp_path):
    X, y = squares
    expected = small().fit(X, y)
    torch.set_default_device("meta")
    try:
        clf = small().fit(X, y).partial_fit(X, y)
        np.testing.assert_array_equal(
            clf.decision_function(X), expected.partial_fit(X, y).decision_function(X)
        )
        loaded = ProtoPNetClassifier.load(clf.save(tmp_path / "model"), device="cpu")
        np.testing.assert_array_equal(loaded.decision_function(X), clf.decision_function(X))
    finally:
        torch.set_default_device(None)
