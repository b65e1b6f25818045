"""Laws of the Triton kernels: their numbers in Triton's interpreter, their memory traffic compiled.

Neither needs a GPU. The interpreter has to be chosen before Triton is imported, so it runs in a
process of its own; this one compiles.
"""

import math
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retina_focal import FocalStarLoss, SigmoidFocalLoss, kernels
from retina_focal.dense_sum import LevelTargets, dense_loss_sum
from retina_focal.places import Places

triton = pytest.importorskip("triton", reason="Triton is not installed, as outside Linux")
import triton.language as tl  # noqa: E402

from retina_focal.kernels import focal_loss  # noqa: E402
from retina_focal.kernels.focal_loss import (  # noqa: E402
    BLOCK,
    BLOCKS,
    BackgroundTerm,
    _gradient_kernel,
    _sum_kernel,
    asymmetric,
    background_gradient,
    background_sums,
    focal,
    focal_star,
    logistic,
    poly1,
)

KERNELS = [_sum_kernel, _gradient_kernel]
# Of p^gamma below it, fp32 has fewer digits: the exponent has used them up.
ATOL = 1e-12


@triton.jit
def hinge_background(x, margin, _):
    """max(0, margin - p_t): a loss that the package has no function for."""
    p, complement, _, _ = logistic(x)
    value = tl.maximum(margin - complement, 0.0)
    return value, tl.where(value > 0, p * complement, 0.0)


TERMS: dict[str, Callable[..., BackgroundTerm]] = {
    "focal": focal,
    "focal_star": focal_star,
    "poly1": poly1,
    "asymmetric": asymmetric,
    "hinge": lambda margin: BackgroundTerm(hinge_background, (margin, 0.0)),
}


def definition(name: str, x: Tensor, *parameters: float) -> Tensor:
    """The loss of background logits, per element, as the paper writes it."""
    if name == "focal_star":
        gamma, beta = parameters
        return -F.logsigmoid(beta - gamma * x) / gamma
    if name == "hinge":
        return (parameters[0] - x.neg().sigmoid()).relu()
    if name == "asymmetric":
        gamma, margin = parameters
        p_m = (x.sigmoid() - margin).clamp(min=0)
        return -(p_m**gamma) * (1 - p_m).log()
    alpha, gamma = parameters
    balance = 1 - alpha if alpha >= 0 else 1
    if name == "poly1":
        epsilon, gamma = gamma, 2
        return definition("focal", x, alpha, gamma) + balance * epsilon * x.sigmoid() ** 3
    return -balance * (gamma * F.logsigmoid(x)).exp() * F.logsigmoid(-x)


def expected(name, parameters, rows, weights, grad_output) -> tuple[Tensor, Tensor]:
    """Sums and gradient of the definition in float64."""
    x = rows.double().requires_grad_()
    loss = definition(name, x, *parameters)
    (gradient,) = torch.autograd.grad((loss.sum(1) * weights.double()).sum() * grad_output, x)
    return loss.detach().sum(1), gradient


def both_passes(name, parameters, rows, weights, grad_output) -> tuple[Tensor, Tensor]:
    """Sums and gradient of the kernels. Runs in the interpreter's process."""
    term = TERMS[name](*parameters)
    half = rows.shape[1] // 2  # as two levels
    sums = background_sums(term, [rows[:, :half], rows[:, half:]])
    return sums, background_gradient(term, rows, weights, grad_output)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable]:
    """`both_passes` in a process where Triton interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        started = pool.submit(both_passes, "focal", (0.25, 2), *case(1, 1))
    with pool:
        started.result()
        yield lambda *arguments, run=both_passes: pool.submit(run, *arguments).result()


def case(num_images: int, length: int, mean: float = -4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights and grad_output, as `background_gradient` takes them."""
    generator = torch.Generator().manual_seed(length)
    rows = 4 * torch.randn(num_images, length, generator=generator) + mean
    return rows, torch.linspace(0.5, 2.0, num_images), torch.tensor(0.25)


# The numbers

LOGITS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30)
LENGTHS = st.one_of(
    st.integers(1, 40),
    st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, BLOCK * BLOCKS, BLOCK * BLOCKS + 1]),
)


@settings(max_examples=40)
@given(
    logits=LOGITS,
    num_images=st.integers(1, 3),
    length=LENGTHS,
    alpha=st.one_of(st.just(-1.0), st.floats(-1, 1, width=32)),
    gamma=st.one_of(st.sampled_from([0.0, 1.0, 2.0, 3.0]), st.floats(0, 5, width=32)),
)
def test_focal_loss_equals_its_definition(interpreted, logits, num_images, length, alpha, gamma):
    count = num_images * length
    rows = torch.tensor(logits).repeat(-(-count // len(logits)))[:count].view(num_images, length)
    arguments = ("focal", (alpha, gamma), rows, *case(num_images, 1)[1:])
    (sums, gradient), (true_sums, true_gradient) = interpreted(*arguments), expected(*arguments)
    torch.testing.assert_close(sums, true_sums, rtol=1e-5, atol=ATOL)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=5e-6, atol=ATOL)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("focal", (-1, 0)),  # cross entropy
        ("focal_star", (2, 1)),
        ("focal_star", (4, 0)),
        ("focal_star", (0.5, -3)),
        ("poly1", (0.25, 1.0)),
        ("poly1", (-1, -0.5)),
        ("asymmetric", (4, 0.05)),
        ("asymmetric", (0, 0.3)),
        ("hinge", (0.5,)),
    ],
)
def test_every_term_goes_through_the_same_kernels(interpreted, name, parameters):
    arguments = (name, parameters, *case(2, 3000, mean=0))
    (sums, gradient), (true_sums, true_gradient) = interpreted(*arguments), expected(*arguments)
    torch.testing.assert_close(sums, true_sums, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=5e-6, atol=ATOL)


@pytest.mark.parametrize("gamma", [0, 0.5, 2, 5])
def test_nothing_overflows(interpreted, gamma):
    rows = torch.tensor([[-100.0, 100.0, -88.0, 88.0, -0.0, 0.0, -3e4, 3e4]])
    sums, gradient = interpreted("focal", (0.25, gamma), rows, torch.ones(1), torch.tensor(1.0))
    assert sums.isfinite().all() and gradient.isfinite().all()
    # Where p is 1, the loss is the logit and its derivative 1, times 1 - alpha.
    torch.testing.assert_close(gradient[0, [1, 3, 7]], torch.full((3,), 0.75))


def test_a_logit_that_is_not_a_number_is_not_hidden(interpreted):
    rows, *others = case(2, 50)
    rows[1, 7] = float("nan")
    sums, gradient = interpreted("focal", (0.25, 2), rows, *others)
    assert sums.isnan().tolist() == [False, True]
    assert gradient.isnan().nonzero().tolist() == [[1, 7]]


# Half precision


def rounded(product: Tensor, dtype: torch.dtype) -> Tensor:
    """What one rounding of fp32 gives: to nearest; Triton's interpreter cuts bf16 off instead."""
    if dtype == torch.bfloat16:
        product = (product.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return product.to(dtype)


@pytest.mark.parametrize("gamma", [1.5, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once_and_last(interpreted, dtype, gamma):
    """So its error is that of the dtype: 2^-11 in fp16, 2^-9 in bf16, where a GPU rounds."""
    rows, *others = case(2, 2000)
    rows = rows.to(dtype)
    sums, gradient = interpreted("focal", (0.25, gamma), rows, *others)
    full_sums, full_gradient = interpreted("focal", (0.25, gamma), rows.float(), *others)
    assert torch.equal(sums, full_sums)
    assert gradient.dtype == dtype and torch.equal(gradient, rounded(full_gradient, dtype))


@pytest.mark.parametrize("normalizer", [1, 100, 1000])
def test_a_loss_scale_keeps_the_gradient_of_fp16_logits(interpreted, normalizer):
    """Unscaled, with pi = 0.01, 63% of it rounds to 0 at 100 positives, and 99.8% at 1,000."""
    generator = torch.Generator().manual_seed(0)
    rows = (0.3 * torch.randn(1, 20_000, generator=generator) - 4.595).half()
    weights, scale = torch.tensor([1 / normalizer]), torch.tensor(65536.0)
    _, gradient = interpreted("focal", (0.25, 2), rows, weights, scale)
    _, true_gradient = expected("focal", (0.25, 2), rows, weights, torch.tensor(1.0))
    error = (gradient.double() / scale - true_gradient).norm() / true_gradient.norm()
    assert error < 1e-3


# Shapes, layouts and where numbers come from


@pytest.mark.parametrize("num_images, length", [(0, 5), (2, 0), (1, 1), (4, 3)])
def test_empty_one_and_many(interpreted, num_images, length):
    rows, weights = torch.zeros(num_images, length), torch.ones(num_images)
    sums, gradient = interpreted("focal", (-1, 0), rows, weights, torch.tensor(1.0))
    # Of a logit of 0, cross entropy is log 2 and its derivative 1/2.
    torch.testing.assert_close(sums, torch.full_like(sums, length * math.log(2)))
    torch.testing.assert_close(gradient, torch.full_like(rows, 0.5))


def test_rows_may_lie_apart(interpreted):
    wide, *others = case(3, BLOCK + 9)
    rows = wide[:, 4:-2]
    apart, together = (interpreted("focal", (0.25, 2), x, *others) for x in (rows, rows.clone()))
    assert all(map(torch.equal, apart, together))
    assert apart[1].is_contiguous()


def test_a_parameter_on_the_device_is_as_good_as_a_number(interpreted):
    rows, weights, grad_output = case(2, 500)
    numbers = interpreted("focal", (0.75, 0.5), rows, weights, grad_output)
    parameters = (torch.tensor(0.75), torch.tensor([0.5], dtype=torch.float64))
    tensors = interpreted("focal", parameters, rows, weights, grad_output.double())
    assert all(map(torch.equal, numbers, tensors))


def test_the_same_logits_give_the_same_bits(interpreted):
    arguments = ("focal", (0.25, 2), *case(2, 5000))
    assert all(map(torch.equal, interpreted(*arguments), interpreted(*arguments)))


# Compiled, for a GPU that need not be here


@pytest.fixture
def compiled(tmp_path, monkeypatch) -> Callable[..., dict[str, str]]:
    """Compiles for an H100 and returns the code of each stage, with names as Triton has them.

    The tensors are aligned and the rows have a multiple of 16 logits, as with 80 classes. `logits`
    is the type of the logits, `size` that of their number, `number` that of the term's parameters.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set, so Triton does not compile")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this build of Triton does not compile for NVIDIA")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_for_h100(kernel, term: BackgroundTerm, logits: str, size="i32", number="fp32"):
        tensors = {"rows": logits, "gradient": logits}
        tensors |= dict.fromkeys(("partial", "weights", "grad_output"), "*fp32")
        sizes = dict.fromkeys(("length", "stride", "partial_stride"), size)
        types = tensors | sizes | dict.fromkeys(("parameter0", "parameter1"), number)
        constants = {"TERM": term.function, "BLOCK": BLOCK, "BLOCKS": BLOCKS}
        names = kernel.arg_names
        source = triton.compiler.ASTSource(
            kernel,
            signature={name: types.get(name, "constexpr") for name in names},
            constexprs={name: value for name, value in constants.items() if name in names},
            attrs={
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(names)
                if name in tensors or name in sizes
            },
        )
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        return triton.compile(source, target=target).asm

    return compile_for_h100


def bytes_per_logit(code: str) -> int:
    """What a kernel reads and writes per logit, by the loads and stores in its Triton GPU code."""
    accesses = re.findall(r"tt\.(?:load|store) .*: (tensor<\d+x)?!tt\.ptr<(f32|f16|bf16)", code)
    assert len(accesses) == len(
        re.findall(r"(?:load|store|atomic\w*|copy\w*|descriptor\w*) %", code)
    )
    assert set(re.findall(r"tensor<(\d+)x", code)) == {str(BLOCK)}
    blocks = [dtype for tensor, dtype in accesses if tensor]
    # The others are a weight, grad_output and a partial sum: one number per program.
    assert len(accesses) - len(blocks) <= 2
    return sum({"f32": 4, "f16": 2, "bf16": 2}[dtype] for dtype in blocks)


@pytest.mark.parametrize(
    "term",
    [focal(0.25, 2), focal(0.25, 1.5), focal_star(2, 1), TERMS["hinge"](0.5)],
    ids=["focal", "focal of any gamma", "focal_star", "hinge"],
)
@pytest.mark.parametrize("logits, most", [("*fp32", 12), ("*bf16", 6), ("*fp16", 6)])
def test_logits_are_read_twice_and_the_gradient_is_written_once(compiled, term, logits, most):
    forward, backward = (
        bytes_per_logit(compiled(kernel, term, logits)["ttgir"]) for kernel in KERNELS
    )
    assert forward + backward <= most and forward == most / 3


@pytest.mark.parametrize("logits", ["*fp32", "*bf16", "*fp16"])
def test_accesses_are_16_bytes_wide_and_rounding_is_to_nearest(compiled, logits):
    forward, backward = (compiled(kernel, focal(0.25, 2), logits)["ptx"] for kernel in KERNELS)
    for code, access in ((forward, "ld"), (backward, "ld"), (backward, "st")):
        assert re.search(rf"{access}\.global\S*\.v4\.b32", code)
    roundings = re.findall(r"cvt\.(\w+)\.b?f16x2\.f32", backward)
    assert set(roundings) == (set() if logits == "*fp32" else {"rn"})


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", ["i32", "i64"])
def test_where_a_block_begins_is_counted_in_64_bits(compiled, kernel, size):
    """The third image of 2^30 logits begins beyond 32 bits, though each number fits into them."""
    code = compiled(kernel, focal(0.25, 2), "*fp16", size)["ttir"]
    assert set(re.findall(r"arith\.muli .* : (\w+)", code)) == {"i64"}


@pytest.mark.parametrize("kernel", KERNELS)
def test_parameters_can_be_in_memory(compiled, kernel):
    code = compiled(kernel, focal(0.25, 1.5), "*fp16", number="*fp32")["ttir"]
    assert len(re.findall("tt.load %parameter", code)) == 2


def test_gamma_2_squares_where_any_gamma_takes_a_power(compiled):
    codes = [compiled(_gradient_kernel, focal(0.25, x), "*fp32")["ttir"] for x in (2, 1.5)]
    assert [code.count("math.exp2") for code in codes] == [2, 3]


# Where they run


class Recorder:
    """Takes the place of a kernel, and keeps its arguments."""

    def __getitem__(self, grid: tuple[int, int]) -> Callable:
        self.grid = grid
        return self

    def __call__(self, *arguments, **constants) -> None:
        self.arguments = arguments


def test_the_host_reads_no_tensor(monkeypatch):
    """Meta tensors have no numbers to read, as those of a GPU have none before the host waits."""
    forward, backward = Recorder(), Recorder()
    monkeypatch.setattr(focal_loss, "_sum_kernel", forward)
    monkeypatch.setattr(focal_loss, "_gradient_kernel", backward)
    rows = torch.empty(2, 5000, dtype=torch.float16, device="meta")
    alpha, weights, grad_output = (torch.empty(n, device="meta") for n in ((), 2, ()))
    for term in (focal(alpha, 2), focal(alpha, alpha), focal_star(alpha, alpha)):
        assert background_sums(term, [rows]).dtype == torch.float64
        assert background_gradient(term, rows, weights, grad_output).dtype == torch.float16
    assert (forward.grid, backward.grid) == ((2, 2), (5, 2))
    # An int would be compiled as one, and again where it is 1.
    background_sums(focal(-1, 1), [rows])
    assert [type(x) for x in forward.arguments[-2:]] == [float, float]


def test_the_kernels_need_triton_and_a_gpu_that_it_supports(monkeypatch):
    available = kernels.available.__wrapped__  # not what it remembers
    device = torch.device("cuda", 0)
    assert not available(torch.device("cpu"))
    for capability, is_supported in (((7, 5), False), ((8, 0), True), ((12, 1), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert available(device) == is_supported
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert not available(device)


def dense_sums(loss, memory_format) -> list[tuple[Tensor, Tensor]]:
    """Loss and gradient of fp16 logits through the kernels, and through PyTorch."""
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(2, 6, 5, 7, generator=generator) - 3).half()
    place = Places(*(torch.tensor(x) for x in ([0, 1], [1, 0], [2, 4], [3, 6])))
    ignored = Places(*(torch.tensor([x]) for x in (1, 1, 0, 0)))
    targets = [LevelTargets(place, torch.tensor([2, 0]), ignored)]
    found = []
    for is_available in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "available", lambda device, answer=is_available: answer)
            x = logits.to(memory_format=memory_format).requires_grad_()
            total = dense_loss_sum(loss, [x], targets, 3, torch.tensor([0.5, 2.0]))
            (1024 * total).backward()
            found.append((total.detach(), x.grad))
    return found


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "loss", [SigmoidFocalLoss(), SigmoidFocalLoss(-1, 0), FocalStarLoss()], ids=str
)
def test_the_dense_sum_is_the_same_through_the_kernels(interpreted, loss, memory_format):
    (total, grad), (expected, expected_grad) = interpreted(loss, memory_format, run=dense_sums)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    # One rounding of fp16.
    torch.testing.assert_close(grad, expected_grad, rtol=2**-10, atol=1e-6)
    assert grad.is_contiguous(memory_format=memory_format)
