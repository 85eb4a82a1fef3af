"""A few real photographs through the whole command; skipped where CamVid is absent."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pspnet_fast.cli import main

REPOSITORY = Path(__file__).parent.parent
CAMVID = REPOSITORY.parent / "shared" / "data" / "camvid"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"CamVid is not at {CAMVID}")
def test_shipped_configuration_trains_on_camvid(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("val", 1)):
        lines = (CAMVID / f"{split}.txt").read_text().splitlines()[:count]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    changes = [f"data.root={CAMVID}", f"data.train_list={tmp_path / 'train.txt'}",
               f"data.val_list={tmp_path / 'val.txt'}", "data.crop=[64,96]", "train.epochs=1", "train.workers=0",
               "train.device=cpu"]  # fmt: skip
    config = str(REPOSITORY / "configs" / "camvid.yaml")
    result = CliRunner().invoke(main, ["train", config, *changes, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    result = CliRunner().invoke(main, ["eval", config, *changes, "--checkpoint", checkpoint, "--json"])
    scores = json.loads(result.stdout)
    assert len(scores["iou"]) == 11
    assert 300 * 480 < sum(map(sum, scores["confusion"])) <= 360 * 480
