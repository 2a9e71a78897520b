"""A grid search over a frozen backbone with `memory=`, against one cold fit.

12 candidates x 3 folds, and the refit; both start with an empty cache. Seconds of the clock and,
for one job, of the processor: with OMP_NUM_THREADS=1 these hardly depend on what else it does.

    python examples/benchmarks/search.py --images photos/train --backbone efficientnet_lite0
"""

import argparse
import tempfile
import time

from photos import photos, protopnet_on
from sklearn.model_selection import GridSearchCV, StratifiedKFold


def main():
    args = arguments()
    paths, y = photos(args.images, args.quick)
    grid = {"prototypes_per_class": [3, 5, 8, 10], "lambda_l1": [2e-4, 5e-4, 1e-3]}
    if args.quick:
        grid = {"prototypes_per_class": [1, 2], "lambda_l1": [5e-4]}
    few = slice(None, None, 1 if args.quick else 3)
    fit(args, paths[few], y[few])  # wakes the libraries
    print(f"{args.backbone} at {args.image_size}, {len(paths)} images, {args.jobs} job(s)")
    for _ in range(args.rounds):
        cold, all_of_them = timed(fit, args, paths, y), timed(search, args, paths, y, grid)
        kinds = ("clock", "processor") if args.jobs == 1 else ("clock",)  # which others add to
        for kind, one, many in zip(kinds, cold, all_of_them, strict=False):
            print(f"{kind}: cold fit {one:.1f} s, search {many:.1f} s, ratio {many / one:.2f}")


def timed(work, *arguments):
    start = time.perf_counter(), time.process_time()
    work(*arguments)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def classifier(args, memory):
    return protopnet_on(
        args.backbone,
        args.image_size,
        prototypes_per_class=2 if args.quick else 10,
        memory=memory,
    )


def fit(args, paths, y):
    with tempfile.TemporaryDirectory() as memory:
        classifier(args, memory).fit(paths, y)


def search(args, paths, y, grid):
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    with tempfile.TemporaryDirectory() as memory:
        clf = classifier(args, memory)
        GridSearchCV(clf, grid, cv=folds, n_jobs=args.jobs).fit(paths, y)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of class folders; default: drawn birds")
    parser.add_argument("--backbone", default="resnet34")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--jobs", type=int, default=1, help="n_jobs of the search")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for correctness only")
    args = parser.parse_args()
    if args.quick:
        args.backbone, args.image_size = "small_cnn", 32
    return args


if __name__ == "__main__":
    main()
