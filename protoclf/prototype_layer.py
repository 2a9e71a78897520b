"""Squared distances between prototypes and latent patches, and their minimum over the map.

The prototype layer of ProtoPNet (Chen et al., "This Looks Like That", NeurIPS 2019, section
2.1): d_j(x) = min over patches of ||patch - p_j||^2 and g_j(x) = log((d_j + 1) / (d_j + eps)).
N images, m prototypes, D channels, H x W cells; a prototype covers H1 x W1 cells, so that an image
has L = H' W' patches of K = D H1 W1 numbers, H' = H - H1 + 1 and W' = W - W1 + 1.

`min_distances` keeps no N m L distances for the backward pass. The nearest patches come from
blocks of matrix products that stay in the processor's cache, and so do the distances, as
||z||^2 - 2 z.p + ||p||^2, where both are taken from a common centre. Where cancellation takes
digits of that, which the logarithm of a near match needs, they are computed anew from the
differences.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclf.torch_settings import float32_matmul_precision, widest_float, without_autocast

_BLOCK_CPU = 2**20  # numbers in a block: 4 MiB of float32, little enough to stay in the caches
_BLOCK_GPU = 2**25  # 128 MiB: few launches matter more than caches
_PER_PAIR = 16  # numbers that the backward pass makes for an image and a prototype, at most
_CLOSE = 0.25  # of ||p||^2: of nearer patches, the difference is computed
_SPARE = 8  # candidates beyond the k nearest, at most, for what rounding puts in the wrong order
_USUAL = 16  # times the median length of the prototypes: of longer ones, none is in the centre
_ROUNDING = 64  # times the last place of ||z||^2 + ||p||^2: what a matrix product may be off


def min_distances(z: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Squared L2 distance from each prototype to the nearest patch of each image.

    Differentiable in both arguments, once, and computed in float32 at least, under autocast too.
    Memory beside the result is a few blocks of fixed size; the backward pass goes through the
    nearest patches alone.

    Parameters
    ----------
    z : Tensor of shape (N, D, H, W)
        Latent maps.
    prototypes : Tensor of shape (m, D, H1, W1)
        Prototypes, no larger than the map.

    Returns
    -------
    distance : Tensor of shape (N, m)
        Distance to the nearest patch: never negative, and 0 where the prototype equals it. NaN
        where a map holds NaN, or infinity that leaves open which patch is nearest.
    cell : Tensor of shape (N, m), int64
        Which patch that is, as the flat index in the map of (H - H1 + 1) x (W - W1 + 1) patches;
        among equally near ones the lowest. Which is nearest a matrix product tells, so that the
        patch may be another one that is as near as its rounding.
    """
    _check_shapes(z, prototypes)
    return torch.ops.protoclf.min_distances(*_as_float(z, prototypes))


def own_class_distances(z: Tensor, prototypes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Squared distances (N, P, k) to the k nearest patches, ascending, and their cells (N, P, k).

    Each image of z (N, D, H, W) has P prototypes of its own, (N, P, D, H1, W1): meant for the
    projection, where an image meets the prototypes of its class. Cells are flat indices, those of
    equally near patches in ascending order. Without gradients.
    """
    _check_shapes(z, prototypes)
    L = n_patches(z, prototypes)
    if not 1 <= k <= L:
        raise ValueError(f"k must be 1 to {L}, the patches of a map; got {k}")
    with torch.no_grad(), without_autocast(z.device):
        z, prototypes = _as_float(z, prototypes)
        size = _images_per_block(z, prototypes, L * prototypes.shape[1])
        blocks = zip(z.split(size), prototypes.split(size), strict=True)
        nearest = [_k_nearest(patches_of(a, p), p.flatten(2), k) for a, p in blocks]
        distance, cell = map(torch.cat, zip(*nearest, strict=True))
    return distance, cell


def distance_maps(z: Tensor, prototypes: Tensor) -> Tensor:
    """Squared L2 distances from every prototype to every patch, (N, m, H - H1 + 1, W - W1 + 1).

    Of maps z (N, D, H, W) and prototypes (m, D, H1, W1). The expanded form in float64, which leaves
    it the digits that cancellation takes; its minimum over a map is that of `min_distances`.
    """
    _check_shapes(z, prototypes)
    z, prototypes = _as_float(z, prototypes)
    with without_autocast(z.device):
        distances = n_patches(z, prototypes) * len(prototypes)  # of an image
        blocks = z.split(_images_per_block(z, prototypes, distances))
        maps = torch.cat([_all_distances(patches_of(a, prototypes), prototypes) for a in blocks])
    return maps.unflatten(2, _map_shape(z, prototypes))  # (N, m, H', W')


def similarity(distance: Tensor, kind: str, eps: float = 1e-4) -> Tensor:
    """Turn squared distances into similarities g, which fall as the distance grows.

    Parameters
    ----------
    distance : Tensor of any shape
        Squared L2 distances.
    kind : {"log", "cosine"}
        "log" is the paper's log((d + 1) / (d + eps)). "cosine" is 1 - d / 2: the cosine, given
        that latents and prototypes went through `unit_length`.
    eps : float, default=1e-4
        Bounds the "log" similarity, to log(1 / eps) at d = 0.

    Returns
    -------
    similarity : Tensor, shaped as `distance`
    """
    if kind == "log":
        return torch.log1p((1 - eps) / (distance + eps))  # the same, without cancellation
    if kind == "cosine":
        return 1 - distance / 2
    raise ValueError(f'similarity must be "log" or "cosine"; got {kind!r}')


def unit_length(x: Tensor, area: int = 1) -> Tensor:
    """Scale the vectors along the channels, dimension 1, to the length 1 / sqrt(area).

    With `area` = H1 W1 a patch of H1 x W1 cells is of unit length, and the squared distance of
    two patches is 2 - 2 times the mean of their cells' cosines.

    In float32 at least. Vectors shorter than 1e-6 stay as good as zero, and the gradient is finite:
    at most 1e6 times what comes in. Their squared distance to one of unit length is 1, as if the
    cosine were 0.5. Those whose length overflows become NaN: they have no direction.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    divisor = torch.where(length > 1e-6, length, 1).masked_fill(length.isinf(), torch.nan)
    return x / (divisor * area**0.5)


def patches_of(z: Tensor, prototypes: Tensor) -> Tensor:
    """Return all patches (n, L, K) of maps (n, D, H, W) of the size of prototypes (D, H1, W1)."""
    h1, w1 = prototypes.shape[-2:]
    columns = z.flatten(2) if h1 == w1 == 1 else F.unfold(z, (h1, w1))  # (n, K, L)
    return columns.transpose(1, 2).contiguous()  # (n, L, K)


def _min_distances(z: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    scores = n_patches(z, prototypes) * min(len(prototypes), 512)  # by that many at a time
    size = _images_per_block(z, prototypes, scores)
    distance = z.new_empty(len(z), len(prototypes))  # (N, m)
    cell = torch.empty_like(distance, dtype=torch.int64)  # (N, m)
    p, shape = prototypes.flatten(1), _map_shape(z, prototypes)  # (m, K)
    buffer = z.new_empty(max(_block(z), n_patches(z, prototypes), p.shape[1]))
    with without_autocast(z.device):
        centre = _centre(p)  # (K,)
        centred = p - centre  # (m, K)
        squares = torch.linalg.vector_norm(centred, dim=1).square_()  # (m,)
        for i in range(0, len(z), size):
            block = slice(i, i + size)
            patches = patches_of(z[block], prototypes)  # (n, L, K)
            for j, score in _scores(patches - centre, centred, buffer):
                cell[block, j], distance[block, j] = _argmax(score.unflatten(1, shape))
            unknown = distance[block].isnan()
            distance[block].mul_(-2).add_(squares).clamp_(min=0)
            _sharpen(distance[block], cell[block], patches, p, squares, buffer)
            distance[block].masked_fill_(unknown, torch.nan)
    return distance, cell


def _centre(p: Tensor) -> Tensor:
    """Mean (K,) of the prototypes (m, K), without those that are far larger than most.

    Seen from the mean of all, one of them would leave the others no digits.
    """
    length = torch.linalg.vector_norm(p, dim=1, keepdim=True)  # (m, 1)
    median = length.sort(0).values[(len(p) - 1) // 2 :][:1]  # GPUs' own is not deterministic
    usual = length <= _USUAL * median
    return torch.where(usual, p, 0).sum(0) / usual.sum()


def _grad_z(g: Tensor, z: Tensor, prototypes: Tensor, cell: Tensor) -> Tensor:
    """Sum over the patches that hold a cell, and the prototypes nearest to each: 2 g (z - p).

    The first part is z times a sum of g; only the second needs the prototypes.
    """
    p, g, L = prototypes.flatten(1), 2 * g, n_patches(z, prototypes)  # (m, K), (N, m)
    size = _images_per_block(z, prototypes, _PER_PAIR * len(prototypes))
    grad = torch.empty_like(z)
    for i in range(0, len(z), size):
        block = slice(i, i + size)
        total = g.new_zeros(len(z[block]), L).scatter_add_(1, cell[block], g[block])  # (n, L)
        total = total[:, None].expand(-1, prototypes[0, 0].numel(), -1)  # (n, h1 w1, L)
        total = _fold(total, z, prototypes)  # (n, 1, H, W)
        pulled = _pulled(g[block], cell[block], p, L)  # (n, K, L)
        torch.mul(z[block], total, out=grad[block])
        grad[block] -= _fold(pulled, z, prototypes)  # (n, D, H, W)
    return grad


def _grad_prototypes(g: Tensor, z: Tensor, prototypes: Tensor, cell: Tensor) -> Tensor:
    """Sum over images: 2 g (p - nearest patch)."""
    g = 2 * g.t()  # (m, N)
    grad = g.sum(1, keepdim=True) * prototypes.flatten(1)  # (m, K)
    size = _images_per_block(z, prototypes, _PER_PAIR * len(prototypes))
    for i in range(0, len(z), size):
        patches = patches_of(z[i : i + size], prototypes)  # (n, L, K)
        bags = _flat(cell[i : i + size], patches.shape[1]).t().contiguous()  # (m, n)
        weights = g[:, i : i + size].contiguous()  # (m, n)
        grad -= _weighted_sums(bags, patches.flatten(0, 1), weights)  # (m, K)
    return grad.view(prototypes.shape)


def _scores(patches: Tensor, p: Tensor, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield scores z.p - ||z||^2 / 2 (n, L, k) of a few prototypes after the other, in `buffer`."""
    rows = patches.flatten(0, 1)  # (n L, K)
    half_square = torch.linalg.vector_norm(rows, dim=1, keepdim=True).square_() / 2  # (n L, 1)
    for j in _chunks(len(p), len(buffer) // len(rows)):
        score = buffer[: len(rows) * len(p[j])].view(len(rows), -1)  # (n L, k)
        torch.addmm(half_square, rows, p[j].t(), beta=-1, out=score)
        yield j, score.view(*patches.shape[:2], -1)


def _argmax(score: Tensor) -> tuple[Tensor, Tensor]:
    """Flat index (n, m) of the largest score (n, H', W', m), the first of equals, and that score.

    The row of the map first, then the cell in it: the plain maximum is many times faster than
    the one that keeps track of indices, and leaves 1 / W' + 1 / H' of the numbers to look through.
    """
    width = score.shape[2]
    rows = score.amax(2)  # (n, H', m)
    best = rows.amax(1)  # (n, m)
    row = _first(rows, best)
    index = row[:, None, None].expand(-1, 1, width, -1)  # (n, 1, W', m)
    column = _first(score.gather(1, index).squeeze(1), best)  # (n, m)
    return row.mul_(width).add_(column), best


def _first(values: Tensor, best: Tensor) -> Tensor:
    """Index (n, m) of the first of the values (n, k, m) that is the best (n, m); any for NaN."""
    k = values.shape[1]
    small = torch.uint8 if k < 256 else torch.int32
    rank = torch.arange(k, 0, -1, dtype=small, device=values.device)[:, None]  # (k, 1)
    found = values == best[:, None]  # (n, k, m)
    return (k - (found * rank).amax(1).long()).clamp_(max=k - 1)


def _sharpen(
    distance: Tensor, cell: Tensor, patches: Tensor, p: Tensor, squares: Tensor, buffer: Tensor
) -> None:
    """Replace distances (n, m) at `cell` where they are small, by those of differences."""
    exact = _product_eps(distance) <= torch.finfo(distance.dtype).eps
    far = distance >= (_CLOSE if exact else torch.inf) * squares
    pairs = _where(~far)  # what overflowed too
    rows, row = patches.flatten(0, 1), _flat(cell, patches.shape[1]).view(-1)[pairs]
    distance.view(-1)[pairs] = _distances_between(rows, row, p, pairs % len(p), buffer)


def _product_eps(x: Tensor) -> float:
    """Return the last place of a matrix product, which users may give up digits of."""
    eps = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}
    given_up = eps[float32_matmul_precision()] if x.dtype == torch.float32 else 0.0
    return max(torch.finfo(x.dtype).eps, given_up)


def _where(wanted: Tensor) -> Tensor:
    """Flat indices of what is wanted; on a GPU, which would have to wait for them, of all."""
    if wanted.device.type == "cpu":
        return wanted.view(-1).nonzero()[:, 0]
    return torch.arange(wanted.numel(), device=wanted.device)


def _distances_between(rows: Tensor, row: Tensor, p: Tensor, of: Tensor, buffer: Tensor) -> Tensor:
    """||rows[row] - p[of]||^2 for each of the pairs, by differences, (pairs,)."""
    distance = rows.new_empty(len(row))
    for some in _chunks(len(row), len(buffer) // rows.shape[1]):
        difference = buffer[: len(row[some]) * rows.shape[1]].view(-1, rows.shape[1])  # (k, K)
        torch.index_select(rows, 0, row[some], out=difference)
        difference -= p[of[some]]
        torch.linalg.vector_norm(difference, dim=1, out=distance[some])
    return distance.square_()


def _pulled(g: Tensor, cell: Tensor, p: Tensor, L: int) -> Tensor:
    """Sum of g_j p_j (n, K, L) over the prototypes j nearest to each patch."""
    index, order = _flat(cell, L).flatten().sort(stable=True)  # (n m)
    start = torch.searchsorted(index, torch.arange(len(g) * L, device=g.device))  # (n L)
    weights = g.flatten()[order]  # (n m)
    pulled = _weighted_sums(order.remainder_(len(p)), p, weights, start)  # (n L, K)
    return pulled.view(len(g), L, -1).transpose(1, 2)  # (n, K, L)


def _weighted_sums(
    index: Tensor, rows: Tensor, weights: Tensor, start: Tensor | None = None
) -> Tensor:
    """Add weighted rows up, without a copy of them: nothing else in torch is as fast at it."""
    return F.embedding_bag(
        index, rows.detach(), start, per_sample_weights=weights.detach(), mode="sum"
    )


def _k_nearest(patches: Tensor, p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and cells (n, P, k) of the patches (n, L, K) nearest to `p` (n, P, K).

    Candidates are those that rounding may have put behind the k nearest, `_SPARE` at most.
    """
    rows, p_rows = patches.flatten(0, 1), p.flatten(0, 1)  # (n L, K), (n P, K)
    centre = patches.mean(1, keepdim=True)  # (n, 1, K), the same whatever the batch
    patches, p = patches - centre, p - centre
    half_square = torch.linalg.vector_norm(patches, dim=2).square_()[:, None] / 2  # (n, 1, L)
    score = torch.baddbmm(half_square, p, patches.transpose(1, 2), beta=-1)  # (n, P, L)
    score, cell = score.sort(dim=2, descending=True, stable=True)
    score, cell = score[..., : k + _SPARE], cell[..., : k + _SPARE]  # (n, P, c)
    scale = half_square.amax(2, keepdim=True) + p.square().sum(2, keepdim=True) / 2  # (n, P, 1)
    rounding = _ROUNDING * _product_eps(score) * scale
    cell, order = cell.sort(dim=2)  # ascending, so that the stable sort keeps equals so
    behind = score < score[..., k - 1 : k] - rounding  # no NaN is
    pairs = _where(~behind.gather(2, order))
    row = _flat(cell, patches.shape[1]).view(-1)[pairs]
    distance = torch.full_like(score, torch.inf)  # (n, P, c)
    buffer = patches.new_empty(max(_block(patches), patches.shape[2]))
    of = pairs.div(cell.shape[2], rounding_mode="floor")
    distance.view(-1)[pairs] = _distances_between(rows, row, p_rows, of, buffer)
    distance, order = distance.sort(dim=2, stable=True)
    return distance[..., :k], cell.gather(2, order[..., :k])


def _all_distances(patches: Tensor, prototypes: Tensor) -> Tensor:
    """Distances (n, m, L) from the prototypes to the patches (n, L, K)."""
    wide = widest_float(patches.device)
    x, p = patches.to(wide), prototypes.flatten(1).to(wide)  # (n, L, K), (m, K)
    x_length, p_length = torch.linalg.vector_norm(x, dim=2), torch.linalg.vector_norm(p, dim=1)
    squares = p_length.square()[:, None] + x_length.square()[:, None]  # (n, m, L)
    return squares.sub_(p @ x.transpose(1, 2), alpha=2).clamp_(min=0).to(patches.dtype)


def _fold(columns: Tensor, z: Tensor, prototypes: Tensor) -> Tensor:
    """Add patches (n, K, L) up to maps (n, D, H, W): the adjoint of cutting them out."""
    if prototypes.shape[2:].numel() == 1:
        return columns.unflatten(2, z.shape[2:])  # (n, D, H, W)
    return F.fold(columns, z.shape[2:], prototypes.shape[2:])  # (n, D, H, W)


def _flat(cell: Tensor, L: int) -> Tensor:
    """Cells (n, ...) of each image as indices into the rows of all images' patches (n L, K)."""
    first = torch.arange(0, len(cell) * L, L, device=cell.device)  # (n)
    return cell + first.view(-1, *[1] * (cell.ndim - 1))


def _map_shape(z: Tensor, prototypes: Tensor) -> tuple[int, int]:
    """H', W'."""
    return z.shape[2] - prototypes.shape[-2] + 1, z.shape[3] - prototypes.shape[-1] + 1


def n_patches(z: Tensor, prototypes: Tensor) -> int:
    """Return how many patches of the size of a prototype there are in a map."""
    height, width = _map_shape(z, prototypes)
    return height * width


def _block(z: Tensor) -> int:
    return _BLOCK_CPU if z.device.type == "cpu" else _BLOCK_GPU


def _images_per_block(z: Tensor, prototypes: Tensor, numbers: int) -> int:
    """How many images make a block, each of its patches and of so many other numbers."""
    patches = n_patches(z, prototypes) * prototypes.shape[-3:].numel()
    return max(1, _block(z) // max(patches, numbers))


def _chunks(m: int, size: int) -> list[slice]:
    return [slice(j, min(j + max(size, 1), m)) for j in range(0, m, max(size, 1))]


def _as_float(*tensors: Tensor) -> list[Tensor]:
    """Cast to the common dtype, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _check_shapes(z: Tensor, prototypes: Tensor) -> None:
    if z.ndim != 4 or prototypes.ndim < 4 or z.shape[1] != prototypes.shape[-3]:
        expected = "(N, D, H, W) and (m, D, H1, W1)"
    elif min(_map_shape(z, prototypes)) < 1:
        expected = "H1 <= H and W1 <= W"
    else:
        return
    shapes = f"{tuple(z.shape)} and {tuple(prototypes.shape)}"
    raise ValueError(f"latent map and prototypes must be {expected}; got shapes {shapes}")


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grad_distance, grad_cell):
    arguments = (grad_distance, *ctx.saved_tensors)
    operators = torch.ops.protoclf
    gradients = operators.min_distances_grad_z, operators.min_distances_grad_prototypes
    needed = zip(gradients, ctx.needs_input_grad, strict=True)
    return tuple(gradient(*arguments) if need else None for gradient, need in needed)


def _no_second_backward(ctx, grad):
    raise NotImplementedError("min_distances can be differentiated once, not twice.")


def _fake_min_distances(z: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    distance = z.new_empty(z.shape[0], prototypes.shape[0])  # (N, m)
    return distance, torch.empty_like(distance, dtype=torch.int64)


def _register(signature: str, function: Callable, fake: Callable) -> None:
    """Make `function` an operator: torch.compile then takes it whole, blocks untraced.

    Not by `torch.library.custom_op`, whose first call imports torch._dynamo: seconds, for each
    process that does but predict.
    """
    name = signature.split("(")[0]
    _library.define(signature)
    torch.library.register_fake(f"protoclf::{name}", fake, lib=_library)
    _library.impl(name, function, "CompositeExplicitAutograd")


_library = torch.library.Library("protoclf", "FRAGMENT")
_register(
    "min_distances(Tensor z, Tensor prototypes) -> (Tensor, Tensor)",
    _min_distances,
    fake=_fake_min_distances,
)
_register(
    "min_distances_grad_z(Tensor g, Tensor z, Tensor prototypes, Tensor cell) -> Tensor",
    _grad_z,
    fake=lambda g, z, prototypes, cell: torch.empty_like(z),
)
_register(
    "min_distances_grad_prototypes(Tensor g, Tensor z, Tensor prototypes, Tensor cell) -> Tensor",
    _grad_prototypes,
    fake=lambda g, z, prototypes, cell: prototypes.new_empty(prototypes.shape),
)
torch.library.register_autograd(
    "protoclf::min_distances", _backward, setup_context=_save, lib=_library
)
for _gradient in ("min_distances_grad_z", "min_distances_grad_prototypes"):
    torch.library.register_autograd(f"protoclf::{_gradient}", _no_second_backward, lib=_library)
