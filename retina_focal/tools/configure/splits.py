"""Train and val of what a user names, as datasets and as settings of a config."""

from detectron2.data import DatasetCatalog, MetadataCatalog

from retina_focal.data.classes import match_classes
from retina_focal.data.coverage import BoxTable, box_table
from retina_focal.data.decisions import Setting, Settings
from retina_focal.data.registration import register
from retina_focal.data.sources import splits
from retina_focal.data.uri import has_scheme, parse
from retina_focal.errors import UserError

HELD_OUT = 0.2  # of the pictures, where there is no val


def find_splits(data: str, val: str | None, stem: str) -> list[tuple[str, str]]:
    """Name and URI of the training set and of val; a registered name is its own URI.

    Raises:
        UserError: there is no telling what val is.
    """
    if val is None and _is_name(data):
        raise UserError(f"dataset '{data}' is a registered name; type its val too: --val NAME")
    if val is None and parse(data).split:
        raise UserError(
            f"'{data}' is one split; type the other too, --val DATA, or name both by their folder "
            "or file alone, without &split="
        )
    if val is not None:
        pairs = (("train", _split_of(data, "train")), ("val", _split_of(val, "val", "valid")))
        return [(x if _is_name(x) else f"{stem}_{kind}", x) for kind, x in pairs]
    by_name = {parse(uri).split: uri for uri in splits(data)}
    train, val = by_name.get("train"), by_name.get("val") or by_name.get("valid")
    if not (train and val):
        if set(by_name) - {"", "train", "test"}:
            raise UserError(
                f"'{data}' has the splits {', '.join(sorted(by_name))}; name those to take, as in: "
                f"'{splits(data)[0]}' --val '{splits(data)[-1]}'"
            )
        mark = "&" if "?" in data else "?"
        train, val = (f"{data}{mark}split={x}&val={HELD_OUT}" for x in ("train", "val"))
    return [(f"{stem}_train", train), (f"{stem}_val", val)]


def _split_of(data: str, *names: str) -> str:
    """The first of these splits that lies at a URI or path which names none; else itself."""
    if _is_name(data) or parse(data).split:
        return data
    by_name = {parse(uri).split: uri for uri in splits(data)}
    return next((by_name[x] for x in names if x in by_name), data)


def _is_name(data: str) -> bool:
    """Whether it is a registered name; a URI may be one too, of an earlier command."""
    return data in DatasetCatalog and not has_scheme(data)


def register_splits(train: tuple[str, str], val: tuple[str, str]) -> list[str]:
    """Register both, with the classes of train; their names.

    Raises:
        UserError: one can't be used, or val has other classes.
    """
    for name, data in (train, val):
        if name != data:
            register(name, data)
    classes = MetadataCatalog.get(train[0]).thing_classes
    match_classes([val[0]], classes, f"train, '{train[1]}',")
    return classes


def expect_choices(val: tuple[str, str], records: list[dict], table: BoxTable) -> None:
    """Expect a val on which something can be chosen, and say where it flatters.

    Raises:
        UserError: it has no box.
    """
    if not len(box_table(records)):
        raise UserError(
            f"val, '{val[1]}', has {len(records):,} pictures and no box in them, so nothing can be "
            "chosen on it; expected some of each class: name another, --val DATA"
        )
    both = {x["file_name"] for x in records} & set(table.file_names)
    if both:
        print(
            f"{len(both):,} of the {len(records):,} pictures of val are in train too: what is "
            "measured on them flatters",
            flush=True,
        )


def dataset_settings(train: tuple[str, str], val: tuple[str, str], named: str | None) -> Settings:
    """The datasets; test is not among them."""
    rows = [list(pair) for pair in (train, val) if pair[0] != pair[1]]
    made = not named and f"val={HELD_OUT}" in val[1]
    why = "a fifth of the pictures, near-duplicates together" if made else "as named"
    return {
        "DATASETS.SOURCES": Setting(rows, "relative paths start from where train is typed"),
        "DATASETS.TRAIN": Setting([train[0]], "what it learns from"),
        "DATASETS.TEST": Setting([val[0]], f"val: {why}; measure test once, at the end"),
        "MODEL.RETINA_FOCAL.DATA.VAL": Setting(val[0], "what choices are made on"),
    }
