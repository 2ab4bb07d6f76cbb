"""Pictures of class maps: PASCAL's colours, and files that hold class numbers."""

import numpy as np
import torch
from PIL import Image

from sslzoo.report.class_maps import palette, predictions, some_rows, write_maps


class Two:
    """Two images of 5 x 7 pixels."""

    image_ids = ("a", 17)
    map_classes = ("background", "cat", "dog")

    def __len__(self):
        return 2

    def picture(self, i):
        return np.full((5, 7, 3), 90 * i, np.uint8)

    def class_map(self, i):
        return torch.arange(35).view(5, 7) % 3 if i else torch.full((5, 7), 255)


def test_colours_are_pascals():
    colours = palette()
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128),
             255: (224, 224, 192)}  # fmt: skip
    assert {k: tuple(colours[k].tolist()) for k in known} == known
    assert len({tuple(colour) for colour in colours.tolist()}) == 256


def test_files_hold_class_numbers_and_leave_no_partial_ones(tmp_path):
    maps = [torch.tensor([[0, 1, 2], [255, 18, 3]], dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)]
    write_maps(tmp_path / "maps", Two(), maps)
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {"a.png", "17.png"}
    with Image.open(tmp_path / "maps" / "a.png") as picture:
        assert picture.mode == "P"
        assert np.asarray(picture).tolist() == maps[0].tolist()
        assert picture.convert("RGB").getpixel((1, 0)) == (128, 0, 0)


def test_photograph_truth_and_prediction_stand_side_by_side(tmp_path):
    rows = some_rows(Two())
    assert rows.tolist() == [0, 1]
    maps = [Two().class_map(1).to(torch.uint8)] * 2
    path = predictions(tmp_path / "predictions.png", Two(), rows, maps, "title")
    colours = {tuple(colour) for colour in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).tolist()}
    assert {(0, 0, 0), (128, 0, 0), (0, 128, 0)} <= colours
