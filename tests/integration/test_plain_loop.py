"""The example of a training loop of one's own learns, under a method that cuts the graph and one that does not."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = (
    "data.train.0.num_images=8", "train.batch_size=4", "data.size=[64,96]", "data.workers=0",
    "model.encoder.name=test_resnet", "model.pyramid.channels=32",
)  # fmt: skip


@pytest.mark.parametrize("balance", ["uncertainty", "upgrad"])
def test_the_loss_goes_down(balance: str):
    main = runpy.run_path(str(ROOT / "docs" / "examples" / "plain_loop.py"))["main"]
    losses = main(str(ROOT / "configs" / "quickstart.yaml"), *SMALL, f"balance={balance}", num_steps=20)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
