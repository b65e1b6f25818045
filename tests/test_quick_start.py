"""`retina-focal quick-start` says what its AP was measured on."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from retina_focal.tools import quick_start


@pytest.mark.parametrize(
    ("name", "opts", "words"),
    [
        ("bccd", [], "(test photographs, "),
        ("trees", [], "(held-out tiles, "),
        ("bccd", ["DATASETS.TEST", "('bccd_val',)"], "(bccd_val, "),
        ("bccd", ["DATASETS.TEST", "('bccd_val', 'bccd_test')"], "(bccd_val, "),
    ],
)
def test_the_ap_is_named_by_what_was_tested(name, opts, words, monkeypatch, tmp_path, capsys):
    def fitted(cfg, resume):
        ap = {"bbox": {"AP": 16.6, "AP50": 54.4}}
        several = len(cfg.DATASETS.TEST) > 1
        results = {x: ap for x in cfg.DATASETS.TEST} if several else ap
        return SimpleNamespace(model=None, results=results, start_iter=0, max_iter=1)

    monkeypatch.setitem(quick_start.PREPARE, name, lambda folder: None)
    monkeypatch.setattr(quick_start, "prepare_weights", lambda: None)
    monkeypatch.setattr(quick_start, "sole_run", lambda *of, **options: nullcontext())
    monkeypatch.setattr(quick_start, "set_up", lambda args, cfg: cfg)
    monkeypatch.setattr(quick_start, "fit", fitted)
    monkeypatch.setattr(quick_start, "draw_detections", lambda *of: None)
    quick_start.main([name, *opts, "OUTPUT_DIR", str(tmp_path)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"AP 16.6  AP50 54.4  {words}")
