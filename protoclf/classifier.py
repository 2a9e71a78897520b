"""`ProtoPNetClassifier`: ProtoPNet as a scikit-learn estimator, on top of skorch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.exceptions import NotFittedError
from skorch import NeuralNet
from torch import nn

from protoclf.activations import Activations
from protoclf.attribution import gradient_boxes, image_boxes
from protoclf.explanation import (
    BOX,
    SOURCE_BOX,
    check_options,
    explain_batch,
    scoring_sheet,
    with_rest_named,
    without_answer,
)
from protoclf.features import FitData, distance_batches, latent_batches
from protoclf.fitted import checked_prototype
from protoclf.fitting import StagedNet
from protoclf.image_dataset import ImageDataset, is_batches
from protoclf.image_errors import ImageError
from protoclf.images import Images, repeated_files
from protoclf.labels import Targets, check_classes, flat_labels, read_targets
from protoclf.localization import covered_cells, upsample
from protoclf.logits import LogitsMixin
from protoclf.losses import ProtoPNetLoss
from protoclf.messages import first_quoted
from protoclf.network import Outputs, ProtoPNet
from protoclf.parameters import refuse_unknown, with_parameters_of
from protoclf.patch_search import view_activations
from protoclf.penalty import FOLDS, PENALTY_LIST, penalties_to_try, penalty_path
from protoclf.persistence import load_classifier, save_classifier
from protoclf.rules import optional
from protoclf.stages import LastLayer
from protoclf.torch_datasets import unpacked


@with_parameters_of(NeuralNet)
class ProtoPNetClassifier(LogitsMixin, TransformerMixin, StagedNet):
    """ProtoPNet: an image classifier that gives a scoring sheet with each prediction.

    A sheet says which parts of the image look like which parts of training images. Similarity
    times weight is a contribution, and the contributions of a class sum to its logit. Chen et al.,
    "This Looks Like That: Deep Learning for Interpretable Image Recognition", NeurIPS 2019.

    Of the parameters, those that matter first are `backbone`, `train_backbone`,
    `prototypes_per_class`, `image_size`, `memory` and `random_state`.

    Parameters
    ----------
    backbone : str or nn.Module, default="resnet18"
        A torchvision name (see `protoclf.backbones.available_backbones`), "small_cnn" (ours, for
        CPUs and without downloads), or a module that maps images (N, 3, S, S) to a feature map
        (N, C, h, w), in float32. A module is copied and never changed. Its parameters that do not
        require gradients are not trained.
    weights : str, path or None, default="DEFAULT"
        torchvision weights, a path to a state dict, or None for random weights. "small_cnn" has
        none: a fit that freezes it warns, unless this is None.
    train_backbone : bool, default=True
        Whether there is a joint stage, which trains the backbone. Without it the backbone's
        features are computed once and reused.
    image_size : int, default=224
        Side of the square model input, in pixels.
    resize : {"crop", "squash"}, default="crop"
        "crop" shows the model the centred square on the shorter side of an image, "squash" the
        whole image, squashed to a square.
    normalization : "imagenet" or (mean, std), default="imagenet"
        The normalization that the backbone expects, for pixels in [0, 1]: three numbers each.
    prototypes_per_class : int, dict or "auto", default=10
        A dict gives each class label its number: at most as many as its images have patches; with
        ``distinct="images"``, as it has images. "auto" keeps the prototypes that a sparse last
        layer uses, up to 20 for a class; with ``distinct="images"``, no more than it has images.
    prototype_size : (int, int) or "full", default=(1, 1)
        Rows and columns of latent cells; "full" is the whole map.
    latent_dim : int or None, default=None
        Channels behind the two 1 x 1 convolutions of the add-on layers (128 in the authors' code).
        None: there are no convolutions, and the backbone's own channels are compared.
    similarity : {"cosine", "log"}, default="cosine"
        "cosine" is 1 - d / 2, of the squared L2 distance d of latents of unit length. "log" is the
        paper's log((d + 1) / (d + 1e-4)). Raw features lie too far apart for "log": it needs a
        `latent_dim`, and training.
    discriminant_weight : float or "auto", default="auto"
        Weight of linear discriminants of the classes in the comparison of patches. A ridge
        regression on the mean cells of the training images says of each latent cell how much it
        speaks for each class. These C numbers are C more channels, and their length is this times
        the length of the other channels (of the mean cells, root mean square). So patches are more
        alike if they speak for the same classes. The last layer learns from each training image by
        discriminants of the other folds of five, as if the image were new. They need
        ``similarity="cosine"`` and no `latent_dim`. "auto" is 0.45 for a frozen backbone, whose
        channels know nothing of the classes, and otherwise 0 (the paper's).
    prototype_init : {"selected", "kmeans", "random"}, default="selected"
        Where prototypes start. "selected": there are 8 to 32 times as many candidates, patches of
        the class, and those that a sparse last layer uses are kept (a class of fewer than 10
        prototypes has the candidates of 10). "kmeans": at the centres of k-means on the latent
        patches of the class. "random": at random (the paper's).
    class_weight : None, "balanced" or dict, default=None
        Weight of the images of each class, multiplied with `sample_weight`. "balanced" gives all
        classes the same total weight.
    distinct : {None, "patches", "images"}, default=None
        Whether the prototypes of a class must be projected onto distinct patches, or even onto
        distinct images.
    lambda_clst, lambda_sep : float, default=0.8, 0.08
        Weights of the cluster and the separation cost in the joint loss.
    lambda_patch : float, default=0.8
        Weight of the patch cost in the joint loss: the mean distance of a prototype to the nearest
        patch of its class in the batch. With it, the projection changes prototypes less (0: the
        paper).
    self_matches : {"auto", "keep", "median"}, default="auto"
        What the last layer sees where a prototype meets the training image that it is a part of: a
        perfect match, as no new image will be. "keep": the activation as it is (the paper's).
        "median": the median activation of the other images of the class. "auto": "median" for rare
        classes only, which the last layer would find too easy; those have fewer than half as many
        training images as the mean class, whatever their weights.
    lambda_l1 : float, "auto" or "cv", default="auto"
        Weight of sum |W| in the last layer's objective. A larger value means fewer prototypes in a
        sheet. "auto" is 5e-4 if the backbone was trained, otherwise 4e-4 with discriminants and
        2e-4 without; for C > 10 classes, this times the root of 10 / C. "cv" chooses by
        cross-validation on the activations: see `last_layer_path_`. A file that is in X several
        times, as after oversampling, is held out as a whole.
    lambda_l2 : float or "auto", default="auto"
        Weight of sum W^2 / 2 / C in the last layer's objective. It shares a weight among
        prototypes that are alike, where `lambda_l1` alone would pick one, and makes sheets longer.
        "auto" is 0 if the backbone was trained, as in the paper. Otherwise it is 1e-3, with which
        predictions are better, most of all if there are few images of each class. It is meant for
        activations of at most 1. Those of "log" are larger, and there it matters less.
    warmup_epochs : int, default=0
        Epochs with the backbone frozen, once. New add-on layers and random prototypes need some
        (5 in the paper).
    joint_epochs : int, default=10
        Epochs with the backbone trained, in each cycle.
    cycles : int, default=1
        Rounds of joint training, projection and last layer; without joint training there is one.
    augmentation : None, "default" or callable, default="default"
        Random transform of uint8 images (3, S, S) in the joint stage, such as one of
        torchvision.transforms.v2. (In the grid of a search, put it inside a `v2.Compose`, because
        scikit-learn takes some of them for estimators.) Stages with the backbone frozen see
        images as they are, and `augmented_views` of them.
    augmented_views : int or "auto", default="auto"
        Number of random transforms of each training image that warm-up and last layer also learn
        from. They are drawn once, and each costs one pass of the backbone. "auto" is 2 for the last
        layer behind a trained backbone, which knows the images as they are by heart, and otherwise
        0.
    memory : None, path or joblib.Memory, default=None
        Folder for the features of the backbone as given. Other fits and `predict` reuse them, in
        this process or another, so a search runs the backbone once for each image. Features are
        found by the contents of image and backbone, never by a name. The folder also keeps the
        starts and projections that fits have in common. A process reads an image file only once
        for this, as long as its size and its times do not change. Nothing is ever removed from the
        folder; delete it when you no longer need it.
    checkpoint : None or path, default=None
        Folder in which a fit keeps its state after the start and after every epoch, until it is
        done. If the fit was stopped, the same fit with the same data goes on from there, and ends
        in the same model. One folder is for one fit at a time.
    optimizer : class, default=torch.optim.Adam
        Class of the optimizer, for the stages that train the network.
    lr : float, default=3e-3
        Learning rate of add-on layers and prototypes.
    backbone_lr : float, default=2e-4
        Learning rate of the backbone (1e-4 in the paper).
    lr_schedule : {"cosine", "step", None}, default="cosine"
        How learning rates fall in the joint stage: to 0 along half a cosine in each cycle, or to
        a tenth every 5 epochs (the paper's).
    batch_norm : {"keep", "train"}, default="keep"
        "keep": batch-norm layers of the backbone that have statistics when `fit` begins keep them
        in the joint stage. "train": they use the statistics of each batch, and learn new ones (the
        paper's). Layers of a backbone without weights have no statistics, and learn them.
    batch_size : int, default=32
        Images of a training step, and images that `predict` and the other methods take at a time.
    micro_batch_size : int, None or "auto", default="auto"
        Number of images for which the backbone computes gradients at a time. A batch is taken in
        pieces of about this size, each of whole classes, and their gradients are added up: the
        same step in less memory. Passes of such a fit without gradients take twice as many images
        at a time. On a GPU small pieces take longer. "auto" is 8 on a CPU, and None, whole batches,
        elsewhere. Batches stay whole if layers of the backbone learn batch-norm statistics (see
        `batch_norm`) or mix images otherwise, and with ``compile=True``.
    train_split : None or callable, default=None
        skorch's validation split, such as ``skorch.dataset.ValidSplit(5, stratified=True)``: it
        scores each epoch. Nothing is trained on, or projected onto, its validation part. A split
        by positions, such as PredefinedSplit, counts only the images that `fit` uses: not those of
        weight 0, nor those that `on_bad_image` skips. ``ValidSplit([(train, valid)])`` is refused
        if images in front of others are left out, because its positions would be ambiguous.
    callbacks : None, "disable" or list of skorch callbacks, default=None
        Called in all stages. Early stopping ends only the stage that is running, not the fit.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Precision of the backbone; all that follows it is in float32. "auto" is bfloat16 for a
        frozen backbone on processors that are faster at it: GPUs since compute capability 8, x86
        CPUs with AVX512-BF16 or AMX. A backbone that is trained computes in float32 with "auto",
        because training in bfloat16 loses fine differences between patches.
    on_bad_image : {"raise", "skip"}, default="raise"
        What happens to an image that cannot be read. "raise": an error names it. "skip": `fit`
        leaves it out and lists it in `skipped_`. The prediction methods, `transform` and `explain`
        return a row without an answer: None, NaN, or "(unreadable)" as `source` in a sheet.
        `score` and `last_layer_path` leave it out. Functions that draw images, and metrics, raise
        the error with "skip" too.
    tune_allocator : bool, default=True
        On a CPU, and with glibc, let the process keep the memory that it frees, which makes
        convolutions several times as fast. `fit` gives this memory back at its end, if it is half
        a GiB or more. `predict` keeps as much memory as a batch takes at its peak.
    device : str or torch.device, default="auto"
        "auto" is the CUDA GPU if there is one, otherwise the CPU.
    random_state : int, RandomState instance or None, default=None
        An int makes the fit repeatable. Fits in threads of one process wait for one another,
        because they share torch's generator.
    verbose : int, default=1
        0 prints nothing.
    **skorch_parameters
        Other parameters of `skorch.NeuralNetClassifier`, such as ``warm_start``, and nested ones,
        such as ``optimizer__weight_decay`` or ``iterator_train__num_workers``. The classifier sets
        some itself, and refuses them: ``module``, ``criterion``, ``dataset``, ``max_epochs``,
        ``classes`` and ``predict_nonlinearity``.

    Attributes
    ----------
    classes_ : ndarray of shape (C,)
        The labels of y, sorted.
    n_prototypes_ : int
        Number m of prototypes.
    prototypes_ : DataFrame
        One row for each prototype:

        - prototype, class : its number, and the class that it belongs to
        - source, source_index : the training image that it is a part of: its path, or its position
          as text; and its position in X
        - row, col : the upper left cell of the patch in the latent map
        - x0, y0, x1, y1 : the box, in pixels of the training image
        - moved : the squared distance by which the projection moved it to the patch
        - weight : its weight for its own class
        - strongest_share : share of the training images in which it is the most similar of all,
          by `activations_`
    coef_ : ndarray of shape (C, m)
        The weights W of the last layer.
    last_layer_result_ : LastLayerResult
        Objective, optimality residual and iterations of the last layer.
    lambda_l1_ : float
        The `lambda_l1` that the last layer was solved with; `last_layer_result_` has `lambda_l2`.
    last_layer_path_ : DataFrame
        With ``lambda_l1="cv"`` only: see `last_layer_path`. With ``prototypes_per_class="auto"``,
        its `weight` is of all prototypes that there were before unused ones were removed.
    activations_ : Activations
        The activations of the training images, 4 n m bytes, and those of `augmented_views`. Edits
        solve the last layer on them: see `protoclf.editing`. With discriminants they are those of
        images that are new to them (see `discriminant_weight`), and not what `transform` returns.
    skipped_ : DataFrame
        With ``on_bad_image="skip"`` only: position, path and reason of each image left out.
    edits_ : DataFrame
        After an edit: which prototypes were removed or started again, in which step, how and why.
    concepts_ : Concepts or None
        After `protoclf.editing.forbid` or `encourage`: the patches that further training avoids or
        approaches.
    seed_ : int
        The seed of every random draw of the fit.
    preprocessing_ : protoclf.geometry.Preprocessing
        The map from an original image to the model's input, and back.
    geometry_ : protoclf.receptive_field.BackboneGeometry
        Cells of the latent map, and what each of them sees.
    history : skorch.history.History
        One row for each epoch, with its stage, and one for each projection and last layer.
    module_ : ProtoPNet
        The network.

    Examples
    --------
    >>> from protoclf import ProtoPNetClassifier
    >>> from protoclf.datasets import make_birds
    >>> import tempfile
    >>> paths, labels, _ = make_birds(tempfile.mkdtemp(), n_per_class=4, image_size=64)
    >>> clf = ProtoPNetClassifier("small_cnn", image_size=64, prototypes_per_class=2,
    ...                           warmup_epochs=1, joint_epochs=1, random_state=0, verbose=0)
    >>> sheet = clf.fit(paths, labels).explain(paths[:1])
    >>> bool(abs(sheet["contribution"].sum() - sheet["logit"].iloc[0]) < 1e-4)
    True
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        *,
        weights: Any = "DEFAULT",
        train_backbone: bool = True,
        image_size: int = 224,
        resize: str = "crop",
        normalization: Any = "imagenet",
        prototypes_per_class: str | int | Mapping[Any, int] = 10,
        prototype_size: tuple[int, int] | str = (1, 1),
        latent_dim: int | None = None,
        similarity: str = "cosine",
        discriminant_weight: float | str = "auto",
        prototype_init: str = "selected",
        class_weight: Any = None,
        distinct: str | None = None,
        self_matches: str = "auto",
        lambda_clst: float = 0.8,
        lambda_sep: float = 0.08,
        lambda_patch: float = 0.8,
        lambda_l1: float | str = "auto",
        lambda_l2: float | str = "auto",
        warmup_epochs: int = 0,
        joint_epochs: int = 10,
        cycles: int = 1,
        augmentation: Any = "default",
        augmented_views: int | str = "auto",
        memory: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        optimizer: Any = torch.optim.Adam,
        lr: float = 3e-3,
        backbone_lr: float = 2e-4,
        lr_schedule: str | None = "cosine",
        batch_norm: str = "keep",
        batch_size: int = 32,
        micro_batch_size: int | str | None = "auto",
        train_split: Any = None,
        callbacks: Any = None,
        precision: str = "auto",
        on_bad_image: str = "raise",
        tune_allocator: bool = True,
        device: Any = "auto",
        random_state: Any = None,
        verbose: int = 1,
        **skorch_parameters: Any,
    ) -> None:
        refuse_unknown(skorch_parameters, type(self))
        super().__init__(
            ProtoPNet,
            criterion=ProtoPNetLoss,
            optimizer=optimizer,
            lr=lr,
            batch_size=batch_size,
            train_split=train_split,
            callbacks=callbacks,
            device=device,
            verbose=verbose,
            **skorch_parameters,
        )
        self.backbone = backbone
        self.weights = weights
        self.train_backbone = train_backbone
        self.image_size = image_size
        self.resize = resize
        self.normalization = normalization
        self.prototypes_per_class = prototypes_per_class
        self.prototype_size = prototype_size
        self.latent_dim = latent_dim
        self.similarity = similarity
        self.discriminant_weight = discriminant_weight
        self.prototype_init = prototype_init
        self.class_weight = class_weight
        self.distinct = distinct
        self.self_matches = self_matches
        self.lambda_clst = lambda_clst
        self.lambda_sep = lambda_sep
        self.lambda_patch = lambda_patch
        self.lambda_l1 = lambda_l1
        self.lambda_l2 = lambda_l2
        self.warmup_epochs = warmup_epochs
        self.joint_epochs = joint_epochs
        self.cycles = cycles
        self.augmentation = augmentation
        self.augmented_views = augmented_views
        self.memory = memory
        self.checkpoint = checkpoint
        self.backbone_lr = backbone_lr
        self.lr_schedule = lr_schedule
        self.batch_norm = batch_norm
        self.micro_batch_size = micro_batch_size
        self.precision = precision
        self.on_bad_image = on_bad_image
        self.tune_allocator = tune_allocator
        self.random_state = random_state

    @classmethod
    def paper(cls, **parameters: Any) -> ProtoPNetClassifier:
        """Return a classifier with the settings of Chen et al. (2019, supplement).

        Parameters
        ----------
        **parameters
            Override single settings, such as ``backbone="vgg16"``.

        Notes
        -----
        Some things differ from the paper. The paper augments the training images once, before
        training. Its code makes 30 of each, so that an epoch has 30 times as many steps
        (`examples/reproduce_paper.py` makes as many). Here the joint stage augments the images
        anew, and the warm-up sees them as they are. The last layer has sign bounds and a penalty
        on all weights, and is solved to its optimum in place of the paper's 20 iterations of Adam.
        Each cycle starts with it at +1 and -0.5.
        """
        settings: dict[str, Any] = {
            "backbone": "resnet34",
            "resize": "squash",
            "latent_dim": 128,
            "similarity": "log",
            "discriminant_weight": 0.0,
            "prototype_init": "random",
            "lambda_clst": 0.8,
            "lambda_patch": 0.0,
            "self_matches": "keep",
            "lambda_l1": 1e-4,
            "lambda_l2": 0.0,
            "warmup_epochs": 5,
            "joint_epochs": 10,
            "cycles": 3,
            "augmented_views": 0,
            "backbone_lr": 1e-4,
            "lr_schedule": "step",
            "batch_norm": "train",
            "batch_size": 80,
            "optimizer__weight_decay": 1e-3,
        }
        return cls(**{**settings, **parameters})

    # Fitting ------------------------------------------------------------------------------------

    def fit(  # type: ignore[override]  # skorch's takes any metadata
        self,
        X: Any,
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ):
        """Train the classifier on images and labels, through all stages, and return it.

        An earlier fit is gone, even if this one is stopped.

        Parameters
        ----------
        X : images
            A list, array, Series or one-column DataFrame of paths; an array (n, H, W, 3) or
            (n, H, W), uint8 or float in [0, 1]; a list of PIL images; or a map-style torch Dataset
            of pairs (image, label), such as torchvision's ImageFolder without a transform.
        y : array-like of shape (n,)
            Class labels: strings, numbers or booleans. May be left out with a Dataset.
        sample_weight : array-like of shape (n,), optional
            Weights of the images in the joint loss, in the rating of candidates for prototypes and
            in the last layer. An image of weight 0 is left out: it cannot become a prototype.
        groups : array-like of shape (n,), optional
            The group of each image, such as the specimen or patient. No split inside `fit` takes a
            group apart. A `train_split` must keep groups together itself, as
            ``ValidSplit(GroupKFold(5))`` does; otherwise it is refused.

        Returns
        -------
        self

        Raises
        ------
        ImageError
            If an image cannot be used. It is raised before training starts, and names position
            and path.
        ValueError
            If a parameter or y cannot be used.
        """
        first = not (self.warm_start and self._is_trained())
        return self._fit(X, y, sample_weight, groups, first)

    def partial_fit(  # type: ignore[override]  # skorch's takes any metadata
        self,
        X: Any,
        y: ArrayLike | None = None,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ):
        """Train the fitted classifier further: joint cycles, projection and last layer on X.

        The first call is a `fit`. Prototypes are projected onto patches of this X, so it should
        hold all the images that prototypes may show. Learning rates, costs and optimizer are
        those that are set at the call. The network stays as the first call built it, even if
        parameters such as `backbone`, `prototypes_per_class` and `similarity` have changed. A
        changed `image_size` or `resize` is a ValueError.

        Parameters
        ----------
        X, y, sample_weight, groups
            As in `fit`. Later calls need an image of each class; with `distinct`, as many images,
            or patches, as the class has prototypes.
        classes : array-like of labels, optional
            The labels of y in the first call; others are refused.
        """
        first = not self._is_trained()
        X, y = unpacked(X, y)
        if classes is not None and not (first and y is None):  # which `fit` refuses
            check_classes(classes, y if first else self.classes_)
        return self._fit(X, y, sample_weight, groups, first)

    # Using it -----------------------------------------------------------------------------------

    @property
    def classes_(self) -> np.ndarray:  # type: ignore[override]  # ensembles set theirs
        """Class labels, sorted, (C,)."""
        if "classes_inferred_" not in vars(self):
            self._fitted()  # says so
        return self.classes_inferred_

    @property
    def n_prototypes_(self) -> int:
        """Number m of prototypes."""
        return len(self._fitted().module_.prototypes)

    @property
    def coef_(self) -> np.ndarray:
        """A copy of the last layer W, (C, m)."""
        if not self._fitting:
            self._fitted()
        return self.weight_matrix().copy()

    def predict(self, X: Any) -> np.ndarray:
        """Return the predicted class label of each image, (n,).

        A callback in the middle of a fit gets class indices, which its data sets have as targets.
        """
        return self._logits(X).argmax(1) if self._is_of_fit(X) else super().predict(X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return the accuracy on images X with labels y.

        With ``on_bad_image="skip"``, images that cannot be read do not count. It then warns, and
        raises ValueError if no image is left. Without y, X is a torch Dataset that holds the labels
        too. Labels and weights are checked before an image is read. For a callback in the middle of
        a fit, y are class indices, as in `predict`.
        """
        if self._is_of_fit(X):
            return ClassifierMixin.score(self, X, y, sample_weight)
        return super().score(X, y, sample_weight)

    def transform(self, X: Any) -> np.ndarray:
        """Return the similarity of each image to each prototype, (n, m): the activations g."""
        return self.similarities(X).numpy()

    def similarities(self, X: Any) -> torch.Tensor:
        """Return what `transform` does as a tensor, whatever `set_output` says."""
        distances = torch.cat([distance for _, distance, _ in self._outputs(X)])
        return self.module_.activations(distances).cpu()

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the columns of `transform`, (m,)."""
        table = self._fitted().prototypes_
        names = [f"prototype{i} ({c})" for i, c in table[["prototype", "class"]].values]
        return np.asarray(names, dtype=object)

    def explain(
        self,
        X: Any,
        classes: str | ArrayLike = "predicted",
        top: int | None = None,
        *,
        attribution: str = "upsampled",
        percentile: float = 95,
    ) -> pd.DataFrame:
        """Return the scoring sheets: a table of what each prototype adds to the logits of an image.

        Parameters
        ----------
        X : images
            As in `fit`.
        classes : {"predicted", "top2", "all"} or array-like of labels, default="predicted"
            The classes to explain: the predicted one, also its rival, all, or these.
        top : int or None, default=None
            Keep this many of the highest contributions of each class. One row sums up the others,
            among them those that speak most against the class. Its `source` is "(rest)", and it
            has no prototype. A small `top` is faster, because boxes are found for the kept rows
            only.
        attribution : {"upsampled", "gradient"}, default="upsampled"
            How boxes are found. "upsampled": from the similarity map, upsampled to the image, as
            in the paper. "gradient": from the gradient of the similarity with respect to the
            pixels. Its boxes are smaller, and take as long as about 20 predictions for each row of
            the sheet. It reads the sources again: a source that is gone keeps its upsampled box,
            with a warning.
        percentile : float, default=95
            A box encloses the pixels of at least this percentile of its map (95 in the paper).

        Returns
        -------
        DataFrame
            One row per sample, class and prototype with a contribution, the highest contribution
            first. A class without any weight in the last layer has no row: its logit is 0 (`fit`
            warns of such classes). With `top`, or with images that cannot be read, columns of
            integers and booleans that may be missing have pandas' nullable types, such as Int64.

            - sample, path : position in X, and the path where X holds paths
            - class, is_predicted, logit, probability : the class that the row speaks for
            - rank, prototype, prototype_class : place in the sheet; number of the prototype, and
              the class that it belongs to
            - similarity, weight, contribution : g_j, W_cj and their product; the contributions
              of a sample and class sum to its logit, except for float32 rounding
            - row, col : the most similar latent cell (of a larger patch, the upper left one)
            - x0, y0, x1, y1 : box of the high activation, in pixels of the original image
            - rf_x0, rf_y0, rf_x1, rf_y1 : receptive field of that cell, all pixels that it can
              see, in pixels of the original image
            - source, source_index, source_class, source_x0 ... source_y1 : the training image
              that the prototype is a part of, and its box there, in pixels of that image
        """
        table = self._fitted().prototypes_
        chosen = self._class_indices(classes)
        check_options(top, attribution, percentile)
        dataset: Any = self.get_dataset(X)
        self.prepare_processor()
        batches, side = [], self.preprocessing_.image_size
        for batch, z in latent_batches(self, dataset):
            found = explain_batch(self.module_, z, chosen, side, percentile, top)
            batches.append(found.assign(sample=found["sample"] + batch.start))
        rows = pd.concat(batches, ignore_index=True)
        cells = rows["row"].to_numpy(), rows["col"].to_numpy()
        fields = np.stack(self.geometry_.cell_box(*cells, *self.module_.prototype_size), axis=1)
        sheet = scoring_sheet(rows, dataset, fields, self.classes_, table)
        if top is not None:
            sheet = with_rest_named(sheet, top)
        sheet = without_answer(sheet, list(dataset.failures), dataset.images.paths)
        if attribution == "gradient":
            sheet[BOX] = gradient_boxes(self, dataset, sheet, percentile)
            sheet[SOURCE_BOX] = self._gradient_boxes_of_sources(sheet, percentile)
        return sheet

    def _gradient_boxes_of_sources(self, sheet: pd.DataFrame, percentile: float) -> pd.DataFrame:
        """Return the boxes of a sheet's sources, which are computed once for each prototype."""
        boxes, known = sheet[SOURCE_BOX].copy(), self._source_boxes
        groups: Any = sheet.groupby("prototype")
        for j, rows in groups:
            if (j, percentile) not in known:
                try:
                    image = Images([self.source_image(int(j))])
                except ImageError as error:
                    warn(
                        f"{error} The box of prototype {j} in it is not by gradient.", stacklevel=3
                    )
                    continue
                dataset = ImageDataset(image, self.preprocessing_)
                found = image_boxes(self, dataset, 0, np.array([j], np.int64), percentile)
                known[j, percentile] = found[0]
            boxes.loc[rows.index] = known[j, percentile]
        return boxes

    def last_layer_path(
        self,
        X: Any,
        y: ArrayLike,
        penalties: Sequence[float] | None = None,
        folds: int = 4,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> pd.DataFrame:
        """Return how accuracy and the number of weights change with `lambda_l1`, as a table.

        It solves the last layer for each penalty, and does not change the classifier. To use a
        penalty, call `clf.set_params(lambda_l1=...)` and fit again, or fit with ``lambda_l1="cv"``.

        Parameters
        ----------
        X, y, sample_weight, groups
            Images as in `fit`, with labels that it saw. On the training images, held-out scores
            are too good: prototypes match the images that they are parts of perfectly, and
            discriminants know the images that they were found by. ``lambda_l1="cv"`` in `fit`
            corrects both. Here activations are what `transform` returns, so a fit has other
            weights with discriminants, and for rare classes with ``self_matches="auto"``.
        penalties : sequence of float, optional
            Values of lambda_l1. By default nine, from 1e-2 to 1e-4 times the largest activation,
            and lower for more than ten classes. For each prototype, the image that is most similar
            to it does not count for the largest activation. `lambda_l2` is the classifier's, for
            all of them.
        folds : int, default=4
            Stratified folds for the held-out columns; 0 leaves these columns out. Without `groups`,
            a file that is in X several times is held out as a whole, as in `fit`.

        Returns
        -------
        DataFrame
            One row a penalty, the largest first:

            - lambda_l1 : the penalty
            - n_nonzero, n_prototypes : weights other than 0, and prototypes that have one
            - objective, train_accuracy : of the solution for all images
            - accuracy, accuracy_std, cross_entropy, cross_entropy_std : on the held-out images,
              mean and standard deviation over the folds
            - weight : the solution for all images, an array (C, m)
        """
        self._fitted()
        if np.iterable(penalties) and not isinstance(penalties, str):
            penalties = list(penalties)
        FOLDS.check(folds=folds)
        optional(PENALTY_LIST).check(penalties=penalties)
        X, y = unpacked(X, y)
        if folds and groups is None:
            groups = repeated_files(Images(X))
        activations, given = self.activations_of(X, y, sample_weight, groups)
        activations = activations.changed(torch.Tensor.double)
        if penalties is None:
            penalties = penalties_to_try(activations, groups=given.groups)
        ridge = LastLayer.of(self).ridge(self)
        path = penalty_path(activations, penalties, folds, self.seed_, given.groups, ridge)
        if folds and path["accuracy"].isna().all():
            raise ValueError(
                "folds needs a class of two images at least, of two groups where there are "
                "groups; folds=0 leaves the held-out columns out."
            )
        return path

    def activations_of(
        self,
        X: Any,
        y: ArrayLike | None,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        views: bool = True,
    ) -> tuple[Activations, Targets]:
        """Return what a last layer is solved on, and what goes with the images that it is of.

        As in `fit`, views of the images are a part of it where `augmented_views` says so, unless
        not asked for. With ``on_bad_image="skip"`` those are left out that cannot be read.
        """
        X, y = unpacked(X, y)
        given = read_targets(Images(X), y, sample_weight, groups, self._fitted().classes_)
        g = self.similarities(X)
        known = given.counting()
        if self.on_bad_image == "skip":
            known &= ~g.isnan().all(1).numpy()
        given = given.of(known)
        weight = self.weights_of(given.codes, given.classes, given.weight)
        codes, owner = torch.from_numpy(given.codes), self.module_.owner.cpu()
        activations = Activations(
            *(g[known], codes, owner, len(given.classes)),
            weight=None if weight is None else torch.from_numpy(weight),
            views=self._views_of(X, known, given.codes) if views else None,
        )
        return activations, given

    @torch.no_grad()
    def _views_of(self, X: Any, known: np.ndarray, codes: np.ndarray) -> torch.Tensor | None:
        """Return the activations (V, k, m) of views of the k images of X that are known."""
        dataset: Any = self.get_dataset(X)
        some = dataset.of(np.flatnonzero(known), codes, None)
        found = view_activations(self, FitData(self, some, None))
        return None if found is None else found.cpu()

    def similarity_maps(self, X: Any, upsampled: bool = False) -> np.ndarray | list[np.ndarray]:
        """Return the similarity of each prototype to each patch of each image.

        Parameters
        ----------
        X : images
        upsampled : bool, default=False
            Upsample each map to the part of the original image that the model sees. If a patch has
            several cells, each cell first gets the similarity of the best patch that covers it.

        Returns
        -------
        ndarray of shape (n, m, H - H1 + 1, W - W1 + 1)
            Or, upsampled, a list of n arrays (m, height, width), in pixels of each original.
        """
        self._fitted()
        maps: list[Any] = []
        images = Images(X)
        dataset = ImageDataset(images, self.preprocessing_)  # which no missing map could fit
        self.prepare_processor()
        for rows, z in latent_batches(self, dataset):
            with torch.no_grad():
                batch = self.module_.similarity_maps(z)  # (n, m, H', W')
            if not upsampled:
                maps.append(batch.cpu().numpy())
                continue
            batch = covered_cells(batch, self.module_.prototype_size)  # (n, m, H, W)
            regions = dataset.preprocessing.region(dataset.sizes(range(rows.start, rows.stop)))
            for one, (x0, y0, x1, y1) in zip(batch, regions, strict=True):
                maps.append(upsample(one, round(y1 - y0), round(x1 - x0)).cpu().numpy())
        return maps if upsampled else np.concatenate(maps)

    def source_image(self, prototype: int) -> np.ndarray:
        """Return the training image (H, W, 3), uint8, that a prototype is a part of.

        If X held paths, the image is read again from its path. A classifier that was saved with
        thumbnails enlarges the thumbnail to the size of the image, so boxes stay right.

        Raises
        ------
        IndexError
            If there is no such prototype.
        ImageError
            If its file is gone, or is not the file that the fit saw.
        """
        sources = self._fitted().prototypes_["source_index"]
        prototype = checked_prototype(prototype, len(sources))
        index = int(sources.iloc[prototype])
        if index in self.source_images_:
            return self.source_images_[index]
        return self._source_files[index].opened(prototype)

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        thumbnails: int | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the fitted classifier to a folder of safetensors and JSON, which runs no code.

        Parameters
        ----------
        folder : str or path
            The new folder. The folder that contains it must exist.
        thumbnails : int or None, default=None
            Also save the training images that prototypes are parts of, with a longer side of at
            most this many pixels. Sheets can then be drawn on a machine without the images. With
            None, only the paths are saved; if X held arrays, their pixels are saved whole.
        overwrite : bool, default=False
            Whether an existing saved model is replaced, once the new one is complete.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        FileExistsError
            If something is there that may not be replaced.
        ImageError
            If a thumbnail is asked for of an image that cannot be read.
        ValueError
            If `image_size` is over 4096, which `load` refuses.

        Warns
        -----
        UserWarning
            If parameters were set that the files cannot hold, such as callbacks, transforms and
            optimizers from elsewhere than torch.optim; after `load` they are at their defaults.
            What belongs to the machine is never saved: `memory`, `checkpoint`, `compile`, `device`.

        Examples
        --------
        >>> from protoclf import ProtoPNetClassifier
        >>> from protoclf.datasets import make_birds
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> paths, labels, _ = make_birds(folder, n_per_class=4, image_size=64)
        >>> clf = ProtoPNetClassifier("small_cnn", image_size=64, prototypes_per_class=2,
        ...                           joint_epochs=1, random_state=0, verbose=0)
        >>> saved = clf.fit(paths, labels).save(folder + "/model")
        >>> loaded = ProtoPNetClassifier.load(saved)
        >>> bool((loaded.predict_proba(paths) == clf.predict_proba(paths)).all())
        True
        """
        return save_classifier(self._fitted(), folder, thumbnails, overwrite)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        backbone: nn.Module | None = None,
        device: Any = "auto",
    ) -> ProtoPNetClassifier:
        """Return the fitted classifier that `save` wrote to a folder.

        No code in the folder is run, and nothing is downloaded. All content is checked.

        Parameters
        ----------
        folder : str or path
        backbone : nn.Module or None, default=None
            If the classifier was fitted with a module of your own: that module, or one made in
            the same way. It is copied, and gets the weights of the file. If the fit trained the
            backbone, the weights that it started from are not in the file: another `fit`, or the
            fit of a clone, starts from the weights of this module.
        device : str or torch.device, default="auto"

        Returns
        -------
        ProtoPNetClassifier

        Raises
        ------
        ModelFileError
            If the folder holds no model, or one that is damaged, inconsistent or of a newer
            version, or if `backbone` is not the model's. It names the file and what is wrong.
        """
        return load_classifier(cls, folder, backbone, device)

    def save_params(self, *args: Any, **kwargs: Any) -> None:
        """Write weights, optimizer or history alone, as skorch's callbacks do during a fit.

        Raises
        ------
        ValueError
            For a fitted classifier: the table of its prototypes would be lost.
        """
        self._refuse_without_table("save_params", "save(folder) writes both")
        super().save_params(*args, **kwargs)

    def load_params(self, *args: Any, **kwargs: Any) -> None:
        """Read what `save_params` wrote, as skorch's callbacks do during a fit.

        Raises
        ------
        ValueError
            For a fitted classifier: the table of its prototypes would be wrong.
        """
        self._refuse_without_table("load_params", "ProtoPNetClassifier.load(folder) reads both")
        super().load_params(*args, **kwargs)

    def _refuse_without_table(self, name: str, other: str) -> None:
        if self._is_trained() and not self._fitting:
            raise ValueError(
                f"{name} knows the weights but not the table of prototypes, prototypes_, which "
                f"says where each comes from; {other}."
            )

    def shown_region(self, sizes: ArrayLike) -> np.ndarray:
        """Return the part of each original that the model sees: boxes (n, 4), in its pixels.

        `sizes` (n, 2) are widths and heights.
        """
        return self._fitted().preprocessing_.region(sizes)

    def _logits(self, X: Any) -> np.ndarray:
        return torch.cat([logits for logits, _, _ in self._outputs(X)]).cpu().numpy()

    @torch.no_grad()
    def _outputs(self, X: Any) -> Iterator[Outputs]:
        """Yield the outputs for each batch of X, on the device: no batch waits for a copy."""
        if self._is_of_fit(X):  # a callback may know the outputs
            for outputs in self.forward_iter(X, training=False, device=self.device):
                yield tuple(output.detach() for output in outputs)
            return
        self._fitted()
        self.prepare_processor()
        dataset: Any = self.get_dataset(X)
        for index, distance, cell in distance_batches(self, dataset):
            failed = torch.from_numpy(dataset.failed(index))
            if failed.any():
                distance = distance.masked_fill(failed[:, None].to(distance.device), torch.nan)
            yield self.module_.logits(distance), distance, cell

    def _is_of_fit(self, X: Any) -> bool:
        """Return whether X is what callbacks have during a fit: a data set of ours, or a batch."""
        return is_batches(X) or (self._fitting and isinstance(X, Mapping))

    def _class_indices(self, classes: str | ArrayLike) -> str | list[int]:
        if isinstance(classes, str) and classes in ("predicted", "top2", "all"):
            return classes
        labels = flat_labels(classes)
        index = {label: i for i, label in enumerate(self.classes_.tolist())}
        unknown = [label for label in labels.tolist() if label not in index]
        if unknown or not len(labels):
            got = f"the unknown {first_quoted(unknown)}" if unknown else "none"
            raise ValueError(
                f'classes must be "predicted", "top2", "all" or labels of y; got {got}. Known are '
                f"{first_quoted(index, most=20)}."
            )
        return list(dict.fromkeys(index[label] for label in labels.tolist()))  # each once

    def _fitted(self) -> ProtoPNetClassifier:
        if not self._is_trained():
            raise NotFittedError(
                f"This {type(self).__name__} instance is not fitted yet. Call 'fit' with "
                "appropriate arguments before using this estimator."
            )
        return self

    # The estimator contract ---------------------------------------------------------------------

    def __sklearn_is_fitted__(self) -> bool:
        return self._is_trained()

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        return BaseEstimator.__repr__(self, N_CHAR_MAX)
