"""How fast the last layer is solved, against Adam on the same activations and scipy's L-BFGS-B.

The activations are made as ProtoPNet makes them: patches of images around parts of their class and
around a background that all classes share, prototypes that are patches of training images, and
the similarity of the nearest patch. They all share a large mean, as real ones do.

    python examples/benchmarks/last_layer.py            # the paper's size: some minutes
    python examples/benchmarks/last_layer.py --quick    # a tiny form that checks the claims' signs
"""

import argparse
import time
import warnings
from itertools import product

import numpy as np
import torch
from scipy.optimize import minimize
from torch.nn.functional import cross_entropy, normalize

from protoclf.last_layer import solve_last_layer

BATCH = 80  # the paper's


def main():
    options = parse()
    sizes = [(300, 40, 8)] if options.quick else [(300, 40, 8), (600, 100, 10), (3000, 500, 50)]
    heading()
    for n, m, n_classes in sizes:
        data = similarities(n, m, n_classes, options.similarity)
        scipy_too = n <= 600 or not options.skip_scipy
        compare(data, options.lambda_l1, options.rates, epochs=20, scipy_too=scipy_too)
    if not options.quick:
        data = similarities(6000, 2000, 200, options.similarity)
        compare(data, options.lambda_l1, options.rates, epochs=20, scipy_too=False)
    if options.backbone:
        backbone_pass(6000)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny size only")
    parser.add_argument("--similarity", choices=["log", "cosine"], default="log")
    parser.add_argument("--lambda-l1", type=float, default=1e-4)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-2], help="for Adam")
    parser.add_argument("--skip-scipy", action="store_true", help="only on the small sizes")
    parser.add_argument("--backbone", action="store_true", help="time ResNet-34 too")
    return parser.parse_args()


def similarities(n, m, n_classes, similarity, n_cells=25, n_channels=64, seed=0):
    """Activations (n, m), labels (n,) and the classes of the prototypes (m,)."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=random)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=random)

    y, owner = torch.arange(n) % n_classes, torch.arange(m) % n_classes
    parts = normal(n_classes, 6, n_channels, scale=1.6)[y[:, None], draw(6, n, n_cells)]
    background = normal(12, n_channels)[draw(12, n, n_cells)]
    z = torch.where(draw(2, n, n_cells, 1).bool(), parts, background)  # (n, cells, D)
    z = z + normal(n_channels, scale=1.5) + normal(n, 1, n_channels, scale=0.5)
    z = normalize(z + normal(n, n_cells, n_channels, scale=0.8), dim=-1)
    source = draw(n // n_classes, m) * n_classes + owner  # an image of its class
    prototypes = z[source, draw(n_cells, m)]  # (m, D)
    cosine = torch.cat([(part @ prototypes.T).amax(1) for part in z.split(100)])  # (n, m)
    if similarity == "cosine":
        return cosine, y, owner
    distance = (2 - 2 * cosine).clamp_min(0)
    return torch.log((distance + 1) / (distance + 1e-4)), y, owner


def compare(data, lambda_l1, rates, epochs, scipy_too):
    """Print one row per method; the objectives are all evaluated by the same lines, in float64."""
    g, y, _ = data
    size = f"{len(g)} x {g.shape[1]}, C={int(y.max()) + 1}"
    solve_last_layer(g[:50], y[:50], data[2], lambda_l1, n_classes=int(y.max()) + 1)  # wakes torch
    result, seconds = timed(solve_last_layer, *data, lambda_l1)
    assert result.converged
    assert result.residual <= 1e-6
    ours = objective(result.weight, data, lambda_l1)
    note = f"residual {result.residual:.1e}, {result.n_iter} iterations"
    show(size, "protoclf", seconds, seconds, ours, note)
    for rate, from_zero in product(rates, (False, True)):
        weight, spent = timed(adam, *data, lambda_l1, rate, epochs, from_zero)
        value = objective(weight, data, lambda_l1)
        assert ours < value
        note = at_time_of(data, lambda_l1, result.n_iter, seconds, spent)
        show(size, f"Adam {rate:g}" + ", W=0" * from_zero, spent, seconds, value, note)
    if scipy_too:
        weight, spent = timed(scipy_lbfgsb, *data, lambda_l1)
        value = objective(weight, data, lambda_l1)
        assert ours <= value + 1e-6
        show(size, "L-BFGS-B", spent, seconds, value, "")


def at_time_of(data, lambda_l1, n_iter, seconds, limit):
    """Say what protoclf has in the time that Adam took: certified, or a solve cut short."""
    if seconds <= limit:
        return "solved before Adam ended"
    for iterations in range(min(n_iter - 1, int(n_iter * limit / seconds) + 1), 0, -1):
        weight, spent = timed(cut_short, data, lambda_l1, iterations)
        if spent <= limit:
            return f"protoclf then: {objective(weight, data, lambda_l1):.5f}"
    return "protoclf then: in its first iteration"


def cut_short(data, lambda_l1, iterations):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return solve_last_layer(*data, lambda_l1, max_iter=iterations).weight


def timed(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def signs(y, owner):
    n_classes = int(y.max()) + 1
    return torch.where(owner == torch.arange(n_classes)[:, None], 1.0, -1.0)  # (C, m)


def objective(weight, data, lambda_l1):
    g, y, _ = data
    weight = weight.double()
    return float(cross_entropy(g.double() @ weight.T, y) + lambda_l1 * weight.abs().sum())


def adam(g, y, owner, lambda_l1, rate, epochs, from_zero):
    """Train from +1 and -0.5 as the paper's code does, or from 0; penalised, the signs kept."""
    torch.manual_seed(0)
    sign = signs(y, owner)
    start = torch.zeros_like(sign) if from_zero else torch.where(sign > 0, 1.0, -0.5)
    weight = start.requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(g)).split(BATCH):
            loss = cross_entropy(g[batch] @ weight.T, y[batch]) + lambda_l1 * weight.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():  # without the bounds it would solve another problem
                weight.copy_(sign * (sign * weight).clamp_min(0))
    return weight.detach()


def scipy_lbfgsb(g, y, owner, lambda_l1):
    """Plain L-BFGS-B on W, in float64."""
    g, sign = g.double().numpy(), signs(y, owner).double().numpy()
    onehot = np.eye(len(sign))[y.numpy()]

    def value_and_gradient(flat):
        weight = flat.reshape(sign.shape)
        logits = g @ weight.T
        logits -= logits.max(1, keepdims=True)
        normaliser = np.exp(logits).sum(1, keepdims=True)
        entropy = np.log(normaliser[:, 0]) - (logits * onehot).sum(1)
        error = (np.exp(logits) / normaliser - onehot) / len(g)
        gradient = error.T @ g + lambda_l1 * sign
        return entropy.mean() + lambda_l1 * (sign * weight).sum(), gradient.ravel()

    bounds = [(0, None) if s > 0 else (None, 0) for s in sign.ravel()]
    options = {"maxiter": 5000, "maxfun": 5000, "ftol": 0, "gtol": 1e-6}
    found = minimize(
        value_and_gradient, np.zeros(sign.size), jac=True, bounds=bounds, options=options
    )
    return torch.from_numpy(found.x.reshape(sign.shape))


def heading():
    print(f"{'size':>19} {'method':>16} {'seconds':>8} {'/ours':>7} {'objective':>10}")


def show(size, method, seconds, ours, value, note):
    print(
        f"{size:>19} {method:>16} {seconds:8.2f} {seconds / ours:7.2f} {value:10.5f} {note}",
        flush=True,
    )


@torch.inference_mode()
def backbone_pass(n, batches=3, batch=32):
    """Time ResNet-34 at 224 on a few batches, and say what that makes for n images."""
    from torchvision.models import resnet34

    network = resnet34(weights=None).eval()
    images = torch.randn(batch, 3, 224, 224)
    network(images)
    seconds = min(timed(network, images)[1] for _ in range(batches)) * n / batch
    print(
        f"ResNet-34 forward at 224, {n} images (from {batches} batches of {batch}): {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
