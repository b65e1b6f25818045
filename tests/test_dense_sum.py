"""Laws of the dense sum: whatever the layout, the definition summed over one-hot targets."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import CHOICES, loss_cfg

from retina_focal import kernels
from retina_focal.dense_sum import LevelTargets, dense_loss_sum
from retina_focal.errors import UserError
from retina_focal.losses import SigmoidFocalLoss, build_classification_loss, sigmoid_focal_loss
from retina_focal.places import Places


def random_case(generator, num_images, num_anchors, num_classes, sizes, fraction=0.2, scale=3.0):
    """Logits per level, labels (N, A, Hi, Wi) in {-1, 0, ..., K} and their `LevelTargets`."""
    logits, labels, targets = [], [], []
    for height, width in sizes:
        shape = (num_images, num_anchors * num_classes, height, width)
        logits.append(scale * torch.randn(shape, generator=generator))
        label = torch.full((num_images, num_anchors, height, width), num_classes)
        drawn = torch.rand(label.shape, generator=generator)
        classes = torch.randint(num_classes, label.shape, generator=generator)
        label = torch.where(drawn < fraction, classes, label)
        label = torch.where(drawn > 1 - fraction, -1, label)
        labels.append(label)
        n, a, y, x = ((label >= 0) & (label < num_classes)).nonzero(as_tuple=True)
        ignored = Places(*(label == -1).nonzero(as_tuple=True))
        targets.append(LevelTargets(Places(n, a, y, x), label[n, a, y, x], ignored))
    return logits, labels, targets


def definition_sum(logits, labels, num_classes, definition):
    """(N,) sums of the element-wise loss, with a one-hot target and a mask, as stock has them."""
    total = 0
    for x, label in zip(logits, labels, strict=True):
        x = x.unflatten(1, (-1, num_classes)).movedim(2, -1)  # (N, A, H, W, K)
        one_hot = F.one_hot(label.clamp(min=0), num_classes + 1)[..., :-1].to(x.dtype)
        loss = definition(x, one_hot) * (label >= 0)[..., None]
        total = total + loss.flatten(1).sum(1)
    return total


def assert_dense_equals_definition(logits, labels, targets, num_classes, loss, definition):
    weights = torch.linspace(0.5, 2.0, len(logits[0]))  # a different gradient for every image
    ours_in = [x.clone().requires_grad_() for x in logits]  # clone keeps the memory format
    ours = dense_loss_sum(loss, ours_in, targets, num_classes, weights)
    ours.backward()
    ref_in = [x.double().requires_grad_() for x in logits]
    ref = (definition_sum(ref_in, labels, num_classes, definition) * weights).sum()
    ref.backward()
    # fp32 terms against float64; what is left of a sum after ignoring nearly all is the worst case.
    scale = max(1.0, sum(float(x.double().abs().sum()) for x in logits))
    torch.testing.assert_close(ours.double(), ref, rtol=1e-5, atol=1e-7 * scale)
    for x, y in zip(ours_in, ref_in, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-6)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    num_images=st.integers(1, 3),
    num_anchors=st.integers(1, 9),
    num_classes=st.integers(1, 6),
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    alpha=st.sampled_from([-1.0, 0.25, 1.0]),
    gamma=st.floats(0, 5),
    fraction=st.sampled_from([0.0, 0.1, 0.5]),
    scale=st.sampled_from([1.0, 10.0, 40.0]),
    channels_last=st.booleans(),
)
def test_dense_sum_equals_the_sum_of_the_definition(
    seed, num_images, num_anchors, num_classes, sizes, alpha, gamma, fraction, scale, channels_last
):
    generator = torch.Generator().manual_seed(seed)
    logits, labels, targets = random_case(
        generator, num_images, num_anchors, num_classes, sizes, fraction, scale
    )
    logits = [x.clamp(-100, 100) for x in logits]
    if channels_last:
        logits = [x.to(memory_format=torch.channels_last) for x in logits]
    assert_dense_equals_definition(
        logits,
        labels,
        targets,
        num_classes,
        SigmoidFocalLoss(alpha, gamma),
        lambda x, t: sigmoid_focal_loss(x, t, alpha, gamma),
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dense_sum_over_many_chunks_equals_the_sum_of_the_definition(memory_format):
    logits, labels, targets = random_case(
        torch.Generator().manual_seed(0), 2, 9, 80, [(13, 17), (3, 2)], fraction=0.01
    )
    logits = [x.to(memory_format=memory_format) for x in logits]
    assert_dense_equals_definition(
        logits, labels, targets, 80, SigmoidFocalLoss(), sigmoid_focal_loss
    )


@pytest.mark.parametrize("name", CHOICES)
def test_dense_sum_of_each_named_loss_equals_the_sum_of_its_definition(name):
    keys, definition, _ = CHOICES[name]
    loss = build_classification_loss(loss_cfg(name, keys))
    case = random_case(torch.Generator().manual_seed(0), 2, 3, 4, [(5, 7), (2, 3)])
    assert_dense_equals_definition(*case, 4, loss, definition)


def test_a_strided_view_of_the_logits_gives_the_same_sum_and_gradient():
    logits, _, targets = random_case(torch.Generator().manual_seed(0), 2, 2, 3, [(4, 6)])
    wide = torch.randn(2, 6, 4, 12)
    wide[..., ::2] = logits[0]
    views = [wide.requires_grad_()[..., ::2]]
    loss = SigmoidFocalLoss()
    dense_loss_sum(loss, views, targets, 3, torch.ones(2)).backward()
    expected = logits[0].requires_grad_()
    dense_loss_sum(loss, [expected], targets, 3, torch.ones(2)).backward()
    assert torch.equal(wide.grad[..., ::2], expected.grad)


def test_when_every_anchor_is_ignored_loss_and_gradient_are_zero():
    logits, labels, _ = random_case(torch.Generator().manual_seed(0), 2, 3, 4, [(5, 6), (2, 3)])
    labels = [torch.full_like(label, -1) for label in labels]
    empty = torch.empty(0, dtype=torch.int64)
    nothing = Places(empty, empty, empty, empty), empty
    targets = [LevelTargets(*nothing, Places(*(x == -1).nonzero(as_tuple=True))) for x in labels]
    logits = [x.requires_grad_() for x in logits]
    total = dense_loss_sum(SigmoidFocalLoss(), logits, targets, 4, torch.ones(2))
    total.backward()
    # The background is added in fp32 and subtracted in float64.
    assert abs(total.item()) < 1e-4
    assert all((x.grad == 0).all() for x in logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_fp32(dtype):
    logits, _, targets = random_case(torch.Generator().manual_seed(0), 2, 3, 5, [(6, 7)])
    half = [x.to(dtype).requires_grad_() for x in logits]
    full = [x.detach().float().requires_grad_() for x in half]
    loss = SigmoidFocalLoss()
    half_sum = dense_loss_sum(loss, half, targets, 5, torch.ones(2))
    full_sum = dense_loss_sum(loss, full, targets, 5, torch.ones(2))
    half_sum.backward()
    full_sum.backward()
    assert half_sum.dtype == torch.float32
    assert torch.equal(half_sum, full_sum)
    assert torch.equal(half[0].grad, full[0].grad.to(dtype))


@pytest.mark.parametrize("normalizer", [1.0, 100.0, 1000.0])
def test_a_loss_scale_keeps_the_fp16_gradient_of_background(normalizer):
    """GradScaler's 65,536 comes with the gradient of the loss: rounding before it leaves zeros."""
    scale, prior = 65536.0, -4.6
    generator = torch.Generator().manual_seed(0)
    logits = (prior + 0.3 * torch.randn(2, 6, 12, 12, generator=generator)).half()
    empty = torch.empty(0, dtype=torch.int64)
    nothing = Places(empty, empty, empty, empty)
    targets = [LevelTargets(nothing, empty, nothing)]
    x = logits.clone().requires_grad_()
    weights = torch.full((2,), 1 / normalizer)
    (scale * dense_loss_sum(SigmoidFocalLoss(), [x], targets, 3, weights)).backward()
    exact = logits.double().requires_grad_()
    (sigmoid_focal_loss(exact, torch.zeros_like(exact)) / normalizer).sum().backward()
    error = (x.grad.double() / scale - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-3  # fp16 rounds by up to 2^-11


def test_the_loss_is_fp64_where_the_logits_are():
    logits, labels, targets = random_case(torch.Generator().manual_seed(0), 2, 3, 5, [(6, 7)])
    x = logits[0].double().requires_grad_()
    total = dense_loss_sum(SigmoidFocalLoss(), [x], targets, 5, torch.ones(2))
    expected = definition_sum([x], labels, 5, sigmoid_focal_loss).sum()
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)
    ours, theirs = (torch.autograd.grad(value, x)[0] for value in (total, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


class Identity:
    """A loss that returns what it was given, and twice the same."""

    def __call__(self, logits, foreground):
        return logits, logits


def test_a_loss_may_return_its_input():
    logits, labels, targets = random_case(torch.Generator().manual_seed(0), 2, 3, 5, [(6, 7)])
    x = logits[0].clone().requires_grad_()
    dense_loss_sum(Identity(), [x], targets, 5, torch.tensor([2.0, 3.0])).backward()
    assert torch.equal(x, logits[0])
    counted = (labels[0] >= 0)[:, :, None].expand(-1, -1, 5, -1, -1).flatten(1, 2)
    weights = torch.tensor([2.0, 3.0])[:, None, None, None]
    assert torch.equal(x.grad, logits[0] * counted * weights)


def test_a_loss_that_changes_its_input_is_refused_in_words():
    logits, _, targets = random_case(torch.Generator().manual_seed(0), 2, 3, 5, [(6, 7)])

    def in_place(x, foreground):
        return x.sigmoid_(), x

    with pytest.raises(UserError, match=r"in_place.* changed the logits in place"):
        dense_loss_sum(in_place, logits, targets, 5, torch.ones(2))


class SoftCrossEntropy:
    """Cross entropy with a soft target q at the positive anchors."""

    soft_targets = True

    def __call__(self, logits, foreground, quality=None):
        target = quality if foreground else torch.zeros(())
        return F.softplus(logits) - target * logits, logits.sigmoid() - target


def test_soft_targets_reach_the_positive_anchors_alone():
    logits, labels, targets = random_case(torch.Generator().manual_seed(0), 2, 3, 5, [(6, 7)])
    quality = torch.rand(len(targets[0].classes), generator=torch.Generator().manual_seed(1))
    x = logits[0].clone().requires_grad_()
    soft = [targets[0]._replace(quality=quality)]
    total = dense_loss_sum(SoftCrossEntropy(), [x], soft, 5, torch.ones(2))
    place, classes, _, _ = targets[0]
    one_hot = torch.zeros(2, 3, 5, 6, 7)
    one_hot[place.image, place.anchor, classes, place.row, place.column] = quality
    counted = (labels[0] >= 0)[:, :, None].float().expand_as(one_hot)
    expected = F.binary_cross_entropy_with_logits(
        x.unflatten(1, (3, 5)), one_hot, weight=counted, reduction="sum"
    )
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(value, x)[0] for value in (total, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_neither_memory_format_is_copied(memory_format):
    logits, _, targets = random_case(torch.Generator().manual_seed(0), 2, 3, 5, [(6, 7)])
    x = logits[0].to(memory_format=memory_format).requires_grad_()
    pointers = []

    class Watching(SigmoidFocalLoss):
        def __call__(self, logits, foreground):
            pointers.append(logits.data_ptr())
            return super().__call__(logits, foreground)

    dense_loss_sum(Watching(), [x], targets, 5, torch.ones(2)).backward()
    first, last = x.data_ptr(), x.data_ptr() + 4 * x.numel()
    assert sum(first <= pointer < last for pointer in pointers) == 2  # the rows of two images
    assert x.grad.is_contiguous(memory_format=memory_format)


def test_autocast_changes_nothing():
    logits, _, targets = random_case(torch.Generator().manual_seed(0), 1, 3, 5, [(6, 7)])
    arguments = SigmoidFocalLoss(), logits, targets, 5, torch.ones(1)
    plain = dense_loss_sum(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dense_loss_sum(*arguments), plain)


def test_without_gradients_the_sum_is_the_same():
    logits, _, targets = random_case(torch.Generator().manual_seed(0), 2, 3, 5, [(6, 7)])
    with_gradients = [x.clone().requires_grad_() for x in logits]
    sums = [
        dense_loss_sum(SigmoidFocalLoss(), x, targets, 5, torch.ones(2))
        for x in (with_gradients, logits)
    ]
    assert torch.equal(*sums) and not sums[1].requires_grad


def test_only_the_levels_that_need_it_get_a_gradient():
    logits, _, targets = random_case(torch.Generator().manual_seed(0), 2, 3, 5, [(6, 7), (3, 4)])
    both = [x.clone().requires_grad_() for x in logits]
    dense_loss_sum(SigmoidFocalLoss(), both, targets, 5, torch.ones(2)).backward()
    second = [logits[0], logits[1].clone().requires_grad_()]
    dense_loss_sum(SigmoidFocalLoss(), second, targets, 5, torch.ones(2)).backward()
    assert torch.equal(second[1].grad, both[1].grad)


def test_two_backward_passes_over_one_graph_give_the_same_gradient():
    logits, _, targets = random_case(torch.Generator().manual_seed(0), 2, 3, 5, [(6, 7)])
    x = logits[0].requires_grad_()
    total = dense_loss_sum(SigmoidFocalLoss(), [x], targets, 5, torch.ones(2))
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(3 * total, x)
    # fp32: 3 times the derivative may round before or after the product.
    torch.testing.assert_close(second, 3 * kept, rtol=1e-6, atol=0)
    assert torch.equal(first, kept)


def test_double_backward_is_refused_in_words():
    logits, _, targets = random_case(torch.Generator().manual_seed(0), 1, 1, 2, [(3, 3)])
    x = logits[0].requires_grad_()
    total = dense_loss_sum(SigmoidFocalLoss(), [x], targets, 2, torch.ones(1))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(total, x, create_graph=True)


class Doubled(SigmoidFocalLoss):
    """A loss derived from one that has a kernel."""

    def __call__(self, logits, foreground):
        value, derivative = super().__call__(logits, foreground)
        return 2 * value, 2 * derivative


def test_a_derived_loss_does_not_run_the_kernel_of_its_base(monkeypatch):
    logits, _, targets = random_case(torch.Generator().manual_seed(0), 2, 3, 5, [(6, 7)])
    x = logits[0].half().requires_grad_()
    expected = 2 * dense_loss_sum(SigmoidFocalLoss(), [x], targets, 5, torch.ones(2))
    monkeypatch.setattr(kernels, "available", lambda device: True)
    total = dense_loss_sum(Doubled(), [x], targets, 5, torch.ones(2))
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    total.backward()
    assert x.grad.isfinite().all()
