"""Deletion and insertion, misalignment and rank stability: known models, and plain loops."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from colour_model import CELL, COLOURS, SIDE, Pooled, colour_model, picture
from scipy.stats import spearmanr
from torch import nn
from torchvision.transforms.v2.functional import gaussian_blur

from protoclf.explanation import BOX
from protoclf.metrics import (
    deletion_insertion,
    deletion_score,
    rank_stability,
    spatial_misalignment,
)
from protoclf.metrics.ranks import kept

LEVELS = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)  # of ImageNet
RED = COLOURS["red"]
X = np.stack([picture({spot: RED}) for spot in [(2, 5), (6, 1), (3, 2), (5, 6), (1, 1)]])


def mirrored(z):
    """Find every colour on the other side of the picture."""
    return z.flip(3)


@pytest.fixture(scope="module")
def local():
    """A model that finds colours where they are."""
    return colour_model()


@pytest.fixture(scope="module")
def elsewhere():
    """A model whose boxes are on the wrong side."""
    return colour_model(Pooled(mirrored))


# ---- deletion and insertion -------------------------------------------------------------------


def gains(clf, images=X, **options):
    table = deletion_insertion(clf, images, **options)
    deletion = table["control_deletion"] - table["deletion"]
    return deletion.mean(), (table["insertion"] - table["control_insertion"]).mean()


def test_where_nothing_decides_no_order_is_better():
    blind = colour_model(weight=[[0, 0], [0, 0]])
    table = deletion_insertion(blind, X)
    areas = table[["deletion", "insertion", "control_deletion", "control_insertion"]]
    assert areas[["deletion", "insertion"]].isna().all(axis=None)  # there is no order
    np.testing.assert_allclose(areas[["control_deletion", "control_insertion"]], 0.5)
    np.testing.assert_allclose(table["probability"], 0.5)


def test_evidence_at_its_place_beats_chance_and_beside_it_does_not(local, elsewhere):
    deletion, insertion = gains(local, n_controls=8)
    assert deletion > 0.1
    assert insertion > 0.01
    wrong_deletion, wrong_insertion = gains(elsewhere, n_controls=8)
    assert wrong_deletion < deletion - 0.1
    assert wrong_insertion < insertion - 0.01


def area_by_hand(clf, order, pixels, steps, c, *, inserted):
    """Change one picture after the other, and ask for its probability."""
    flat = pixels.reshape(-1, 3)
    blurred = gaussian_blur(torch.from_numpy(pixels).permute(2, 0, 1), [3, 3], [5 / 7] * 2)
    start = blurred.permute(1, 2, 0).numpy().reshape(-1, 3) if inserted else flat
    finish = (
        flat if inserted else np.broadcast_to(flat.mean(0).round().astype(np.uint8), flat.shape)
    )
    probabilities = []
    for t in range(steps + 1):
        image = start.copy()
        first = order[: round(t * len(order) / steps)]
        image[first] = finish[first]
        probabilities.append(clf.predict_proba(image.reshape(1, SIDE, SIDE, 3))[0, c])
    return (sum(probabilities) - (probabilities[0] + probabilities[-1]) / 2) / steps


@pytest.mark.parametrize("size", [1, 2])
def test_areas_are_those_of_one_picture_after_the_other(size):
    clf = colour_model(weight=[[0.3, -0.1], [-0.2, 0.4]])
    if size == 2:
        prototypes = clf.module_.prototypes.expand(-1, -1, 2, 2).contiguous().detach()
        clf.replace_prototypes(prototypes, clf.module_.owner, clf.module_.last_layer.weight.data)
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    table = deletion_insertion(clf, images, n_steps=8)
    for i, pixels in enumerate(images):
        c = clf.predict_proba(pixels[None])[0].argmax()
        maps = clf.similarity_maps(pixels[None])[0, c] * clf.coef_[c, c]  # its own prototype
        cells = np.full((8, 8), -np.inf)
        for (row, col), g in np.ndenumerate(maps):
            covered = np.s_[row : row + size, col : col + size]
            cells[covered] = np.maximum(cells[covered], g)
        up = torch.nn.functional.interpolate(
            torch.from_numpy(cells)[None, None], (SIDE, SIDE), mode="bicubic"
        )
        order = np.argsort(-up.numpy().ravel(), kind="stable")
        for name in ("deletion", "insertion"):
            area = area_by_hand(clf, order, pixels, 8, c, inserted=name == "insertion")
            assert table.loc[i, name] == pytest.approx(area, abs=1e-4), name
        assert table.loc[i, "class"] == clf.classes_[c]


def test_seeds_change_the_controls_alone(local):
    first, second = (deletion_insertion(local, X[:2], random_state=s) for s in (0, 1))
    assert first["deletion"].equals(second["deletion"])
    assert not first["control_deletion"].equals(second["control_deletion"])
    assert first.equals(deletion_insertion(local, X[:2], random_state=0))


def test_neither_seeds_nor_images_share_their_controls():
    """Where each pixel counts, another place of a box has another effect."""
    striped = colour_model()
    same = np.random.default_rng(3).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
    same = np.repeat(same, 3, axis=0)
    for function, column in (
        (deletion_insertion, "control_deletion"),
        (deletion_score, "control_logit_drop"),
    ):
        draws = [function(striped, same, random_state=s)[column].tolist() for s in (0, 1)]
        assert len(set(draws[0] + draws[1])) == 6
        assert function(striped, same[:1])[column].tolist() == draws[0][:1]


# ---- misalignment -----------------------------------------------------------------------------

HARD = {"epsilon": 5.0, "step_size": 0.5}


def test_a_local_prototype_loses_nothing_and_one_elsewhere_all(local, elsewhere):
    table = spatial_misalignment(local, X, **HARD)
    np.testing.assert_allclose(table["activation_change"], 0, atol=1e-6)
    assert (table["rank_change"] == 0).all()
    assert (table["prediction_changed"] == 0).all()
    lost = spatial_misalignment(elsewhere, X, **HARD)
    assert (lost["activation_change"] > 0.9).all()
    assert lost["location_change"].mean() > 0.9
    assert (lost["rank_change"] == 1).all()  # the blue prototype is more similar
    assert (lost["prediction_changed"] == 1).all()
    np.testing.assert_allclose(lost["similarity"], table["similarity"])


def test_without_an_attack_nothing_changes(local, elsewhere):
    for clf in (local, elsewhere):
        table = spatial_misalignment(clf, X, epsilon=0.0, n_steps=1)
        changes = ["location_change", "activation_change", "rank_change", "prediction_changed"]
        np.testing.assert_allclose(table[changes].to_numpy(float), 0, atol=1e-6)


def attacked_by_hand(clf, i, box, j, epsilon, step, n_steps):
    """Descend one image at a time; return its pixels (3, S, S)."""
    image = torch.from_numpy(X[i]).permute(2, 0, 1).float()
    free = torch.ones(SIDE, SIDE)
    grow = 10 / 224 * SIDE
    for row in range(SIDE):
        for col in range(SIDE):
            inside = box[0] - grow <= col < box[2] + grow and box[1] - grow <= row < box[3] + grow
            free[row, col] = not inside
    start = np.random.default_rng((0, i)).uniform(-1, 1, (3, SIDE, SIDE))
    change = torch.from_numpy(start).float() * epsilon
    scale = LEVELS
    for _ in range(n_steps):
        change.requires_grad_()
        pixels = (image + change * scale * free).clamp(0, 255)
        maps = clf.module_.similarity_maps(clf.module_.latents(clf.module_.features(pixels[None])))
        maps[0, j].max().backward()
        change = (change.detach() - step * change.grad.sign()).clamp(-epsilon, epsilon)
    return (image + change * scale * free).clamp(0, 255).detach(), float(free.mean())


def found_by_hand(clf, pixels, j):
    """The highest tenth of the upsampled map of prototype j."""
    with torch.no_grad():
        maps = clf.module_.similarity_maps(clf.module_.latents(clf.module_.features(pixels[None])))
    up = torch.nn.functional.interpolate(maps[:, [j]].double(), (SIDE, SIDE), mode="bicubic")
    up = up[0, 0].numpy()
    return up > np.percentile(up, 90) + 1e-4, maps[0].flatten(1).amax(1).numpy()


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_the_attack_is_that_of_one_image_after_the_other(elsewhere, epsilon):
    options = {"epsilon": epsilon, "step_size": epsilon / 5, "n_steps": 4}
    table = spatial_misalignment(elsewhere, X, **options)
    sheet = elsewhere.explain(X).set_index("sample")
    for i in range(len(X)):
        j, box = sheet.loc[i, "prototype"], sheet.loc[i, BOX].to_numpy(float)
        pixels, free = attacked_by_hand(elsewhere, i, box, j, epsilon, epsilon / 5, 4)
        before, g = found_by_hand(elsewhere, torch.from_numpy(X[i]).permute(2, 0, 1), j)
        after, new_g = found_by_hand(elsewhere, pixels, j)
        row = table.loc[i]
        assert row["prototype"] == j
        assert row["attacked_share"] == pytest.approx(free)
        assert row["activation_change"] == pytest.approx(1 - max(new_g[j], 0) / g[j], abs=1e-4)
        overlap = (before & after).sum() / (before | after).sum()
        assert row["location_change"] == pytest.approx(1 - overlap, abs=0.03)
        assert row["rank_change"] == int(new_g[1 - j] > new_g[j]) - int(g[1 - j] > g[j])


def test_where_similarity_was_negative_no_share_of_it_is_lost():
    clf = colour_model(similarity="cosine", colours=[COLOURS["blue"], (0, 255, 255)])
    clf.replace_prototypes(
        clf.module_.prototypes.detach(), clf.module_.owner, torch.tensor([[0.0, -1.0], [0.0, 0.0]])
    )
    grey_red = np.stack([picture({}, background=RED)])
    table = spatial_misalignment(clf, grey_red, n_steps=1)
    assert table["similarity"].item() < 0
    assert np.isnan(table["activation_change"].item())


def test_where_nothing_speaks_for_the_class_nothing_is_attacked():
    clf = colour_model(weight=[[0, 0], [0, 0.5]])  # blue ones: no evidence, for no class
    blue = picture({(2, 2): COLOURS["blue"]}, background=(0, 0, 0))
    table = spatial_misalignment(clf, np.stack([X[0], blue]), n_steps=1)
    assert table["class"].tolist() == ["red", "red"]
    mute = colour_model(weight=[[0, 0], [0, -0.5]])
    found = spatial_misalignment(mute, X[:1], n_steps=1)
    assert found["class"].tolist() == ["blue"]
    assert found.drop(columns=["sample", "path", "class"]).isna().all(axis=None)
    assert table["prototype"].tolist() == [1, 1]


# ---- rank stability ---------------------------------------------------------------------------


class Roughness(nn.Module):
    """How far pixels differ from those of their cell: 0 in a flat picture."""

    def forward(self, x):
        flat = nn.functional.avg_pool2d(x, CELL).repeat_interleave(CELL, 2)
        return nn.functional.avg_pool2d((x - flat.repeat_interleave(CELL, 3)).abs(), CELL)


def test_noise_turns_the_ranks_of_roughness_around():
    smooth = [(127.5 + k / 100,) * 3 for k in range(5)]
    rough = [(137.5 + k / 100,) * 3 for k in range(5)]
    clf = colour_model(Roughness(), colours=smooth + rough, owner=(0,) * 5 + (1,) * 5)
    table = rank_stability(clf, np.stack([picture({})] * 3)).set_index("change")
    assert (table.loc["jpeg", "kept"] == 1).all()
    assert (table.loc["noise", "kept"] == 0).all()
    assert (table.loc["jpeg", "correlation"] == 1).all()
    assert (table.loc["noise", "correlation"] < 0).all()
    assert (table.loc["noise", "same_class"] == 0).all()
    everything = rank_stability(clf, np.stack([picture({})]), top=10)
    assert (everything["kept"] == 1).all()


def test_prototypes_out_of_use_do_not_count():
    weight = [[1, 0, 0, 0], [0, 0, 1, 0]]
    clf = colour_model(colours=[RED, RED, (0, 0, 0), RED], owner=(0, 0, 1, 1), weight=weight)
    table = rank_stability(clf, X[:1], top=1)
    assert (table["kept"] == 1).all()
    assert (table["correlation"] == 1).all()  # of two
    idle = colour_model(weight=[[0, 0], [0, 0]])
    assert rank_stability(idle, X[:1])["kept"].isna().all()


def test_ranks_are_those_of_a_sort(fitted, squares):
    images = squares[0][:5]
    options = {"top": 2, "quality": 30, "noise": 0.5, "clip": 0.4, "random_state": 7}
    table = rank_stability(fitted, images, **options).set_index(["sample", "change"])
    used = np.flatnonzero((fitted.coef_ != 0).any(0))
    pixels = fitted.get_dataset(images).decoded(np.arange(5))
    for i, image in enumerate(pixels):
        file = io.BytesIO()
        PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=30)
        draws = np.random.default_rng((7, i)).standard_normal((3, 48, 48), dtype=np.float32)
        noise = torch.from_numpy((0.5 * draws).clip(-0.4, 0.4))
        changed = {
            "jpeg": torch.from_numpy(np.array(PIL.Image.open(file))).permute(2, 0, 1),
            "noise": image + noise * LEVELS,
        }
        clean = similarities(fitted, image)[used]
        for change, shown in changed.items():
            g = similarities(fitted, shown)[used]
            best, then = (set(np.argsort(-v, kind="stable")[:2]) for v in (clean, g))
            assert table.loc[(i, change), "kept"] == len(best & then) / 2
            assert table.loc[(i, change), "correlation"] == pytest.approx(spearmanr(clean, g)[0])


def similarities(clf, image):
    with torch.no_grad():
        _, distance, _ = clf.module_(image[None])
        return clf.module_.activations(distance)[0].numpy()


def test_the_share_that_is_kept():
    before = np.array([[5, 4, 3, 2, 1.0]])
    assert kept(before, before[:, ::-1], 2) == 0
    assert kept(before, before[:, ::-1], 3) == pytest.approx(1 / 3)
    assert kept(before, np.array([[4, 5, 0, 0, 0.0]]), 2) == 1
    assert kept(before, before[:, ::-1], 9) == 1


# ---- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [rank_stability, spatial_misalignment])
def test_the_batch_size_does_not_matter(elsewhere, function):
    first = function(elsewhere, X)
    elsewhere.set_params(batch_size=5)
    second = function(elsewhere, X)
    elsewhere.set_params(batch_size=3)
    for name in first:
        if first[name].dtype == float:
            np.testing.assert_allclose(first[name], second[name], atol=1e-5)
        else:
            assert first[name].equals(second[name])


def test_random_states_matter(local):
    first, second = (spatial_misalignment(local, X, random_state=s) for s in (0, 1))
    assert not first["location_change"].equals(second["location_change"])


@pytest.mark.parametrize(
    ("function", "wrong", "message"),
    [
        (deletion_insertion, {"n_steps": 0}, "n_steps must be an int >= 1"),
        (spatial_misalignment, {"epsilon": -0.1}, "epsilon must be a finite number >= 0"),
        (rank_stability, {"quality": 100}, "quality must be an int from 1 to 95"),
        (rank_stability, {"top": 0}, "top must be an int >= 1"),
    ],
)
def test_wrong_arguments_are_refused(local, function, wrong, message):
    with pytest.raises(ValueError, match=message):
        function(local, X, **wrong)
