"""Sum and gradient of a loss over all logits of a pyramid level, each logit taken as background.

With the loss f of one background logit, these are sum_x f(x) of each image, and the gradient
weight_i grad_output f'(x) of each logit x of image i. What is not background is the caller's.

It takes two passes. The forward pass reads the logits and writes a few sums. The backward pass
reads the logits again and writes the gradient. All else stays in registers, so an element costs 12
bytes of memory traffic in fp32 (4 read, 4 read, 4 written), and 6 in bf16 and fp16. One pass could
write f'(x) beside the sum, but in fp16 most of it would round to 0: GradScaler's factor arrives
only with `grad_output`. Here the product is taken in fp32 and rounded once.

A loss says what f is with a `BackgroundTerm`. `focal` and `focal_star` make those of the paper. A
loss of your own brings a function, which the same kernels call:

    @triton.jit
    def hinge(x, margin, _):  # max(0, margin - p_t), where p_t is 1 - p
        p, complement, _, _ = logistic(x)
        value = tl.maximum(margin - complement, 0.0)
        return value, tl.where(value > 0, p * complement, 0.0)

    term = BackgroundTerm(hinge, (0.5, 0.0))
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import KernelInterface

# Elements at a time: 8 for each of 128 threads, so that accesses are 16 bytes wide in every dtype.
BLOCK = 1024
# Blocks per program of the forward pass, which sums over its threads once for all of them.
BLOCKS = 4


@dataclass(frozen=True)
class BackgroundTerm:
    """The loss of one background logit.

    Args:
        function: a `triton.jit` function that takes (x, parameter 0, parameter 1) and returns f(x)
            and f'(x). x is a block of fp32 logits, the parameters are fp32 numbers. A pass uses one
            of the two results, and what only the other needs is not computed.
        parameters: numbers, or tensors of one element on the device of the logits. The host does
            not read these, so it does not wait for them. Fill up with 0 what is not needed.
    """

    function: KernelInterface
    parameters: tuple[float | Tensor, float | Tensor]


def focal(alpha: float | Tensor, gamma: float | Tensor) -> BackgroundTerm:
    """Focal loss: (1 - alpha) p^gamma softplus(x). Cross entropy has alpha -1 and gamma 0.

    Args:
        alpha: weight of the positives in [0, 1]; < 0: no balancing.
        gamma: focusing parameter >= 0.
    """
    # A tensor is not compared: the host would wait for it.
    is_2 = not isinstance(gamma, Tensor) and gamma == 2
    return BackgroundTerm(_focal_of_gamma_2 if is_2 else _focal, (alpha, gamma))


def focal_star(gamma: float | Tensor, beta: float | Tensor) -> BackgroundTerm:
    """FL*: softplus(gamma x - beta) / gamma, with gamma above 0."""
    return BackgroundTerm(_focal_star, (gamma, beta))


def poly1(alpha: float | Tensor, epsilon: float | Tensor) -> BackgroundTerm:
    """Poly-1 focal loss with gamma 2: (1 - alpha) p^2 (softplus(x) + epsilon p); alpha as above."""
    return BackgroundTerm(_poly1_of_gamma_2, (alpha, epsilon))


def asymmetric(gamma: float | Tensor, margin: float | Tensor) -> BackgroundTerm:
    """-p_m^gamma log(1 - p_m) with p_m = max(p - margin, 0); the margin is above 0, below 1."""
    return BackgroundTerm(_asymmetric, (gamma, margin))


def background_sums(term: BackgroundTerm, levels: Sequence[Tensor]) -> Tensor:
    """The forward pass: the sum of f over the logits of each image.

    Args:
        levels: (N, M) logits of N images in fp32, bf16 or fp16, per pyramid level. Elements of a
            row are neighbours in memory, in any order; rows may lie apart.
    Returns:
        (N,) float64, with a relative error of 1e-5 at most. The same logits give the same bits.
    """
    num_images = len(levels[0])
    num_programs = [triton.cdiv(rows.shape[1], BLOCK * BLOCKS) for rows in levels]
    partial = levels[0].new_empty(num_images, sum(num_programs), dtype=torch.float32)
    for rows, own in zip(levels, partial.split(num_programs, dim=1), strict=True):
        _launch(_sum_kernel, own.shape[1], term, rows, own, partial.shape[1], BLOCKS=BLOCKS)
    return partial.sum(1, dtype=torch.float64)


def background_gradient(
    term: BackgroundTerm,
    rows: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    gradient: Tensor | None = None,
) -> Tensor:
    """The backward pass: weight_i grad_output f'(x) of each logit x of image i.

    Args:
        rows: (N, M), as in `background_sums`.
        weights: (N,) fp32, of each image's loss.
        grad_output: one number, on the device, in any floating dtype.
        gradient: contiguous tensor like `rows` to write to; default: a new one.
    Returns:
        (N, M) in the dtype of `rows`, contiguous. Its relative error is 5e-6 at most for elements
        above 1e-12, and one rounding in bf16 and fp16.
    """
    assert weights.shape == rows.shape[:1] and weights.is_contiguous() and grad_output.numel() == 1
    gradient = rows.new_empty(rows.shape) if gradient is None else gradient
    num_programs = triton.cdiv(rows.shape[1], BLOCK)
    _launch(_gradient_kernel, num_programs, term, rows, gradient, weights, grad_output)
    return gradient


def _launch(
    kernel: KernelInterface,
    num_programs: int,
    term: BackgroundTerm,
    rows: Tensor,
    *others: Tensor | int,
    **constants: int,
) -> None:
    """Run a kernel with `num_programs` programs per image."""
    num_images, length = rows.shape
    assert length < 2 or rows.stride(1) == 1, f"expected neighbours in memory, not {rows.stride()}"
    # As floats: Triton compiles again for an int, and once more where it is 1.
    parameters = (x if isinstance(x, Tensor) else float(x) for x in term.parameters)
    with torch.cuda.device_of(rows):
        kernel[num_programs, num_images](
            rows,
            *others,
            length,
            rows.stride(0),
            *parameters,
            TERM=term.function,
            BLOCK=BLOCK,
            **constants,
        )


@triton.jit
def _sum_kernel(
    rows,
    partial,
    partial_stride,
    length,
    stride,
    parameter0,
    parameter1,
    TERM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    program, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    parameter0, parameter1 = _number(parameter0), _number(parameter1)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for i in range(BLOCKS):
        begin, index, inside = _block(program * BLOCKS + i, length, BLOCK)
        x = tl.load(rows + image * stride + begin + index, mask=inside, other=0.0)
        value, _ = TERM(x.to(tl.float32), parameter0, parameter1)
        total += tl.where(inside, value, 0.0)
    # No atomics: their order, and so the last bits of the sum, would be chance.
    tl.store(partial + image * partial_stride + program, tl.sum(total, 0))


@triton.jit
def _gradient_kernel(
    rows,
    gradient,
    weights,
    grad_output,
    length,
    stride,
    parameter0,
    parameter1,
    TERM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    parameter0, parameter1 = _number(parameter0), _number(parameter1)
    scale = tl.load(weights + image) * _number(grad_output)
    begin, index, inside = _block(program, length, BLOCK)
    x = tl.load(rows + image * stride + begin + index, mask=inside, other=0.0)
    _, derivative = TERM(x.to(tl.float32), parameter0, parameter1)
    product = (scale * derivative).to(gradient.dtype.element_ty)
    tl.store(gradient + image * length + begin + index, product, mask=inside)


@triton.jit
def _block(block, length, BLOCK: tl.constexpr):
    """Where a block of a row begins, its indices, and which of them the row has.

    A level can have more logits than 32 bits count. Only the beginning has to be 64 bits wide.
    """
    begin = block * BLOCK
    index = tl.arange(0, BLOCK)
    return begin, index, index < tl.minimum(length - begin, BLOCK).to(tl.int32)


@triton.jit
def _number(x):
    """fp32 of a number, or of the one that a tensor holds."""
    if isinstance(x, float):  # the interpreter leaves numbers as they are
        return x
    if x.dtype.is_ptr():
        x = tl.load(x)
    return x.to(tl.float32)


@triton.jit
def logistic(x):
    """p = sigmoid(x), 1 - p, softplus(x) = -log(1 - p), and log2(p), of fp32 x within +-1e38.

    Each keeps its digits where it is close to 0. There is no division, which is ten instructions
    on a GPU, and powers are of 2, which is one: p^gamma is exp2(gamma log2(p)).
    """
    t = x * 1.4426950408889634  # x / log(2)
    e = tl.exp2(-tl.abs(t))  # exp(-|x|)
    # log2(1 + e) is e times a polynomial, and so keeps the digits of a small e. This is the minimax
    # polynomial of degree 7 on [0, 1]: relative to log2(1 + e) it is wrong by 2e-7.
    series = 0.0636079454 - 0.012319489 * e
    series = 0.256009761 + e * (-0.155351942 + e * series)
    series = 0.480063698 + e * (-0.35339484 + e * series)
    log2_1p = e * (1.44269476 + e * (-0.721310088 + e * series))
    larger = tl.exp2(-log2_1p)  # of p and 1 - p: 1 / (1 + e)
    smaller = e * larger
    p, complement = tl.where(x >= 0, larger, smaller), tl.where(x >= 0, smaller, larger)
    softplus = tl.maximum(x, 0.0) + 0.6931471805599453 * log2_1p
    return p, complement, softplus, tl.minimum(t, 0.0) - log2_1p


@triton.jit
def _focal(x, alpha, gamma):
    p, complement, softplus, log2_p = logistic(x)
    weight = _balance(alpha) * tl.exp2(gamma * log2_p)
    return weight * softplus, weight * (p + gamma * complement * softplus)


@triton.jit
def _focal_of_gamma_2(x, alpha, gamma):
    # The derivative needs p anyway, and a square is less work than a power. The value does not.
    value, _ = _focal(x, alpha, gamma)
    p, complement, softplus, _ = logistic(x)
    return value, _balance(alpha) * p * p * (p + gamma * complement * softplus)


@triton.jit
def _balance(alpha):
    return tl.where(alpha >= 0, 1.0 - alpha, 1.0)


@triton.jit
def _focal_star(x, gamma, beta):
    p, _, softplus, _ = logistic(gamma * x - beta)
    return softplus / gamma, p


@triton.jit
def _poly1_of_gamma_2(x, alpha, epsilon):
    p, complement, softplus, _ = logistic(x)
    weight = _balance(alpha) * p * p
    own = p + 2.0 * complement * softplus
    return weight * (softplus + epsilon * p), weight * (own + 3.0 * epsilon * p * complement)


@triton.jit
def _asymmetric(x, gamma, margin):
    p, complement, _, _ = logistic(x)
    # Below the margin any p_m will do, and 1 is none that overflows.
    p_m, rest = tl.where(p > margin, p - margin, 1.0), complement + margin
    cross_entropy, weight = -tl.log(rest), tl.exp2(gamma * tl.log2(p_m))
    slope = p * complement * (gamma * cross_entropy / p_m + 1.0 / rest)
    return tl.where(p > margin, weight * cross_entropy, 0.0), tl.where(
        p > margin, weight * slope, 0.0
    )
