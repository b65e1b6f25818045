"""Numbers and pictures of `retina-focal anatomy`."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import cv2
import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from torchvision.ops import box_iou

from retina_focal.evaluation.drawing import WHITE, class_color, legend, write_picture
from retina_focal.losses import FocalStarLoss, SigmoidFocalLoss
from retina_focal.tools.anatomy.windows import HALF, Anatomy, HardWindow, LossTally
from retina_focal.tools.reports import figure, table

SIDES = ("negatives", "positives")
# Of the paper's two readings of its figure: a fifth of the positives, most of the negatives' loss.
HARDEST_POSITIVES = 0.2
NEGATIVE_LOSS = 0.9
COLUMNS = 5  # of a contact sheet
TILE = 240  # pixels
CAPTION = 42  # pixels
CAPTION_FONT = (cv2.FONT_HERSHEY_SIMPLEX, 0.45)
GAP = 6  # pixels
CONTEXT = 2.5  # side of a crop over the longer side of its anchor
MIN_CROP = 48  # pixels of the picture
GREY = 90


def numbers(anatomy: Anatomy) -> dict:
    """All that can be said in numbers of at least one positive and one negative window."""
    tally, images = anatomy.tally, anatomy.num_images
    # Negatives and positives; p_t <= 0.5 and p_t > 0.5 last.
    by_level = tally.by_level.reshape(*tally.by_level.shape[:-1], 2, HALF).sum(-1)
    return {
        "alpha": tally.alpha,
        "gammas": list(tally.gammas),
        "images": images,
        "per_image": {
            "candidate anchors": anatomy.num_anchors / images,
            "ignored anchors": anatomy.num_ignored / images,
            **{side: tally.num_windows(i == 1) / images for i, side in enumerate(SIDES)},
        },
        "sentence": sentence(tally),
        "total": _rows(["all"], by_level.sum(1, keepdims=True), tally.gammas),
        "by_level": _rows(anatomy.level_names, by_level, tally.gammas),
        "by_class": _rows(anatomy.class_names, tally.by_class, tally.gammas),
        "cumulative": {side: _cumulative(tally, i == 1) for i, side in enumerate(SIDES)},
    }


def sentence(tally: LossTally) -> str:
    """What share of the loss comes from what share of the windows, at the outermost gammas."""
    gammas = sorted({min(tally.gammas), max(tally.gammas)})
    positive, negative = [], []
    for gamma in gammas:
        share = tally.cumulative(True, gamma).loss_of_hardest(HARDEST_POSITIVES)
        positive.append(f"{_percent(share)} at gamma {gamma:g}")
        share = tally.cumulative(False, gamma).hardest_with(NEGATIVE_LOSS)
        negative.append(f"their hardest {_percent(share)} at gamma {gamma:g}")
    return (
        f"Of the positives' loss, the hardest {HARDEST_POSITIVES:.0%} of them make "
        f"{' and '.join(positive)}; {NEGATIVE_LOSS:.0%} of the negatives' loss comes from "
        f"{' and '.join(negative)}."
    )


def _rows(names: Sequence[str], sums: np.ndarray, gammas: Sequence[float]) -> list[dict]:
    """One per name and gamma, from (2, names, 1 + G, 2) counts and loss sums."""
    rows = []
    for i, name in enumerate(names):
        for j, gamma in enumerate(gammas, start=1):
            row = {"name": name, "gamma": gamma}
            for side in (1, 0):
                loss = float(sums[side, i, j].sum())
                row[SIDES[side]] = {
                    "windows": int(sums[side, i, 0].sum()),
                    "loss": loss,
                    "well_classified": float(sums[side, i, j, 1]) / loss if loss else None,
                }
            rows.append(row)
    return rows


def _cumulative(tally: LossTally, is_positive: bool) -> dict:
    curves = {gamma: tally.cumulative(is_positive, gamma) for gamma in tally.gammas}
    return {
        "hardest_windows": next(iter(curves.values())).windows.tolist(),
        "loss": {f"{gamma:g}": curve.loss.tolist() for gamma, curve in curves.items()},
        "error": {f"{gamma:g}": curve.error for gamma, curve in curves.items()},
    }


def markdown(report: dict) -> str:
    """The tables."""
    per_image = ", ".join(f"{value:,.1f} {name}" for name, value in report["per_image"].items())
    errors = [e for side in SIDES for e in report["cumulative"][side]["error"].values()]
    lines = [
        f"`{report['command']}`\n",
        f"{report['weights']} on {report['images']} images of {report['dataset']}, "
        f"{report['date']}; alpha {report['alpha']:g}. An image has {per_image}; positives and "
        "negatives are windows, (anchor, class) pairs.\n",
        f"**{report['sentence']}**\n",
        "Losses are sums over all images, not normalised. p_t > 0.5: the share of that loss that "
        "comes from well-classified windows. The cumulative distributions are exact at the edges "
        f"of their bins and off by at most {max(errors):.1g} of the loss between them.",
    ]
    for title, key in (("Total", "total"), ("By level", "by_level"), ("By class", "by_class")):
        heads = [title, "gamma"]
        for side in reversed(SIDES):
            heads += [side, f"loss of {side}", "p_t > 0.5"]
        rows = []
        for row in report[key]:
            cells = [row["name"], f"{row['gamma']:g}"]
            for side in reversed(SIDES):
                share = row[side]["well_classified"]
                cells += [f"{row[side]['windows']:,}", f"{row[side]['loss']:,.4g}"]
                cells.append("-" if share is None else _percent(share))
            rows.append(cells)
        lines += ["", table(heads, rows)]
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    """Two digits: 41%, 4.1%, 0.041%."""
    percent = 100 * share
    digits = 1 - math.floor(math.log10(percent)) if percent > 0 else 0
    return f"{percent:.{max(digits, 0)}f}%"


def plot(tally: LossTally, text: str, path: Path) -> None:
    """Fig. 4 of the paper, with a sentence below."""
    names = ("negatives (background)", "positives (foreground)")
    with figure(path, 9, 4.6) as drawn:
        for side, axes in zip((1, 0), drawn.subplots(1, 2), strict=True):
            for gamma in tally.gammas:
                curve = tally.cumulative(side == 1, gamma)
                # Ascending: the easiest windows come first.
                axes.plot(1 - curve.windows, 1 - curve.loss, label=rf"$\gamma$ = {gamma:g}")
            axes.set(xlabel=f"fraction of {names[side]}, by rising loss", xlim=(0, 1))
            axes.set(ylabel="cumulative normalised loss", ylim=(0, 1))
            axes.set_title(f"{tally.num_windows(side == 1):,} {SIDES[side]}")
            axes.grid(alpha=0.3)
            axes.legend(loc="upper left")
        drawn.supxlabel(fill(text, 110), fontsize=10)


def plot_curves(gammas: Sequence[float], path: Path) -> None:
    """Fig. 1 of the paper, and the losses and derivatives of its appendix A (Figs. 5 and 6).

    No alpha. The appendix has cross entropy, FL with gamma 2, and FL* with (gamma, beta) (2, 1)
    and (4, 0).
    """
    p_t = torch.linspace(1e-3, 1 - 1e-6, 1000, dtype=torch.float64)
    x_t = torch.linspace(-5, 5, 1000, dtype=torch.float64)
    losses = {
        "CE": SigmoidFocalLoss(-1, 0),
        r"FL, $\gamma$ = 2": SigmoidFocalLoss(-1, 2),
        r"FL*, $\gamma$ = 2, $\beta$ = 1": FocalStarLoss(2, 1),
        r"FL*, $\gamma$ = 4, $\beta$ = 0": FocalStarLoss(4, 0),
    }
    with figure(path, 13.5, 4.4) as drawn:
        by_p, by_x, derivatives = drawn.subplots(1, 3)
        for gamma in gammas:
            name = rf"FL, $\gamma$ = {gamma:g}" if gamma else r"CE ($\gamma$ = 0)"
            loss, _ = SigmoidFocalLoss(-1, gamma)(p_t.logit(), foreground=True)
            by_p.plot(p_t, loss, label=name)
        by_p.axvspan(0.5, 1, color="0.93", zorder=0)
        by_p.text(0.75, 2.2, "well-classified\nexamples", ha="center")
        by_p.set(xlabel=r"$p_t$, probability of the true class", ylabel="loss")
        by_p.set(xlim=(0, 1), ylim=(0, 5))
        for name, loss in losses.items():
            value, derivative = loss(x_t, foreground=True)
            by_x.plot(x_t, value, label=name)
            derivatives.plot(x_t, derivative, label=name)
        by_x.set(xlabel=r"$x_t$, signed logit", ylabel="loss", xlim=(-5, 5), ylim=(0, 5))
        derivatives.set(xlabel=r"$x_t$, signed logit", xlim=(-5, 5))
        derivatives.set(ylabel=r"derivative by $x_t$")
        for axes in (by_p, by_x, derivatives):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=9)


def contact_sheet(
    hardest: Sequence[HardWindow], class_names: Sequence[str], is_positive: bool, path: Path
) -> None:
    """Crops of windows, at least one, hardest first; raises as `write_picture` does.

    The anchor is white, ground truth has the colour of its class.
    """
    tiles = [_tile(window, class_names, is_positive) for window in hardest]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % COLUMNS)
    rows = [cv2.hconcat(tiles[i : i + COLUMNS]) for i in range(0, len(tiles), COLUMNS)]
    header = _header(class_names, is_positive, rows[0].shape[1])
    write_picture(path, cv2.vconcat([header, *rows]))


def _tile(window: HardWindow, class_names: Sequence[str], is_positive: bool) -> np.ndarray:
    """(TILE + CAPTION + GAP, TILE + GAP, 3) RGB."""
    image = read_image(window.file_name, format="RGB")
    x0, y0, x1, y1 = window.anchor
    side = max(CONTEXT * max(x1 - x0, y1 - y0), MIN_CROP)
    scale = TILE / side
    # Pixels of the picture to pixels of the tile.
    shift_x, shift_y = (TILE / 2 - scale * middle for middle in ((x0 + x1) / 2, (y0 + y1) / 2))
    affine = np.array([[scale, 0, shift_x], [0, scale, shift_y]])
    crop = cv2.warpAffine(image, affine, (TILE, TILE), borderValue=(GREY,) * 3)
    for box, label in zip(window.gt_boxes, window.gt_classes, strict=True):
        _rectangle(crop, box, affine, class_color(label))
    _rectangle(crop, window.anchor, affine, WHITE)
    tile = np.full((TILE + CAPTION + GAP, TILE + GAP, 3), 255, np.uint8)
    tile[:TILE, :TILE] = crop
    name = class_names[window.label]
    # logaddexp: a score near 0 would overflow exp.
    score = math.exp(-np.logaddexp(0, -window.x_t if is_positive else window.x_t))
    for y, text in ((16, f"{name}, score {score:.2f}"), (34, _truth(window, class_names))):
        cv2.putText(tile, text, (2, TILE + y), *CAPTION_FONT, (0, 0, 0), 1, cv2.LINE_AA)
    return tile


def _rectangle(crop: np.ndarray, box: np.ndarray, affine: np.ndarray, color: tuple) -> None:
    """A line with a dark edge, legible on any ground."""
    corners = (box.reshape(2, 2) * affine[[0, 1], [0, 1]] + affine[:, 2]).round().astype(int)
    for line, width in (((0, 0, 0), 4), (color, 2)):
        first, second = corners.tolist()
        cv2.rectangle(crop, first, second, line, width)


def _truth(window: HardWindow, class_names: Sequence[str]) -> str:
    """The ground truth that the anchor overlaps most."""
    if len(window.gt_boxes) == 0:
        return "no box in the image"
    ious = box_iou(*map(torch.as_tensor, (window.gt_boxes, window.anchor[None])))[:, 0]
    best = int(ious.argmax())
    if ious[best] == 0:
        return "overlaps no box"
    return f"IoU {ious[best]:.2f} with {class_names[window.gt_classes[best]]}"


def _header(class_names: Sequence[str], is_positive: bool, width: int) -> np.ndarray:
    """What the sheet shows, and the colours of the first classes."""
    header = np.zeros((CAPTION, width, 3), np.uint8)
    kind = "positives of the lowest score" if is_positive else "negatives of the highest score"
    entries = [(f"{kind} (white: anchor); boxes:", WHITE)]
    entries += [(name, class_color(i)) for i, name in enumerate(class_names)]
    legend(header, (8, 26), entries, width)
    return header
