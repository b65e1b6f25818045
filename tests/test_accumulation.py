"""Laws of gradient accumulation: micro-batches give what the whole batch gives."""

import pytest
import torch
from conftest import pictures
from test_processes import distance, step, tiny_model

from retina_focal import NORMALIZER_REGISTRY
from retina_focal.training.accumulation import accumulate_gradients

# Sizes that pad differently; one image without a box.
SIZES, NUM_BOXES = [(64, 96), (96, 64), (50, 130), (128, 90)], [5, 0, 2, 9]


def accumulated(model, batch, num_micro_batches):
    """The loss and, by name, the gradients."""
    losses = accumulate_gradients(model, batch, num_micro_batches)
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    assert not any(loss.requires_grad for loss in losses.values())
    return float(sum(losses.values())), gradients


@pytest.mark.parametrize("num_micro_batches", [2, 4])
@pytest.mark.parametrize("normalizer", [name for name, _ in NORMALIZER_REGISTRY])
def test_loss_and_gradient_are_the_whole_batchs(normalizer, num_micro_batches):
    batch = pictures(SIZES, NUM_BOXES)
    whole, split = (tiny_model(normalizer=normalizer).double().train() for _ in range(2))
    loss, gradients = step(whole, batch)
    split_loss, split_gradients = accumulated(split, batch, num_micro_batches)
    assert split_loss == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients.items():
        assert distance({name: gradient}, split_gradients) < 1e-12, name


def test_the_moving_average_moves_once_a_step():
    batch = pictures(SIZES, NUM_BOXES)
    whole, split = (tiny_model(normalizer="ema").train() for _ in range(2))
    step(whole, batch)
    accumulated(split, batch, 4)
    assert whole.criterion.loss_normalizer != 100
    assert torch.equal(whole.criterion.loss_normalizer, split.criterion.loss_normalizer)


def test_positives_are_counted_as_the_training_step_finds_them():
    model = tiny_model().train()
    seen = []
    model.criterion.register_forward_pre_hook(lambda module, args: seen.append(args[3]))
    # 72x90 is padded to 96x96.
    for sizes in ([(64, 96)] * 4, [(72, 90), (64, 64), (50, 96), (32, 33)]):
        batch = pictures(sizes, NUM_BOXES)
        counts = model.count_positives(batch)
        model(batch)
        labels = seen.pop()
        assert counts.tolist() == ((labels >= 0) & (labels < model.num_classes)).sum(1).tolist()
        assert counts.sum() > 0


def test_a_loaders_last_batch_may_be_smaller():
    batch = pictures(SIZES, NUM_BOXES)[:3]
    loss, gradients = step(tiny_model(normalizer="image").train(), batch)
    for num_micro_batches in (2, 4):
        split = accumulated(tiny_model(normalizer="image").train(), batch, num_micro_batches)
        assert split[0] == pytest.approx(loss, rel=1e-6)
        assert distance(gradients, split[1]) < 5e-6
