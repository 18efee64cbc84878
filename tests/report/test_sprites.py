"""Test that what a page shows is what the files hold."""

import base64
import io
import zlib

import numpy as np
from PIL import Image

import config
from pictures import figure
from report import sprites


def imageOf(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(',')[1]))).convert('L'))


def test_classColors_ofTheCavityAreTheSameWhereverItIsShown():
    """The cavity looks the same as class 4 of five and beside four classes; with two there is none."""
    found = [(figure.classNames(), figure.classColors()) for config.NO_CLASSES in (4, 5)]
    assert found[0] == found[1] and len(found[0][0]) == 5
    config.NO_CLASSES = 2
    assert figure.classNames() == ['background', 'tumor'] and len(figure.classColors()) == 2


def test_packVolumes_keepsEveryLabel():
    """Unpacked by hand, prediction and truth equal what was packed, voxel for voxel."""
    generator = np.random.default_rng(0)
    prediction, truth = np.zeros((2, 20, 24, 16), np.uint8)
    prediction[4:9, 5:17, 3:8] = generator.integers(0, 5, (5, 12, 5))
    truth[6:12, 2:9, 5:9] = generator.integers(0, 4, (6, 7, 4))
    packed = sprites.packVolumes({}, prediction, truth, (1, 1, 1))
    size = packed['labelSize']
    labels = np.frombuffer(zlib.decompress(base64.b64decode(packed['labels'])), np.uint8).reshape(size[::-1]).T
    starts = np.add(packed['start'], packed['labelStart'])
    both = np.zeros(truth.shape, np.uint8)
    both[tuple(slice(start, start + length) for start, length in zip(starts, size, strict=True))] = labels
    np.testing.assert_array_equal(both % 16, prediction)
    np.testing.assert_array_equal(both // 16, truth)


def test_packVolumes_laysSlicesRowByRowFrontUp():
    """Of a volume of 8 mm voxels, which stays as it is, each tile is a slice with the front on top."""
    image = np.zeros((12, 16, 5), np.float32)
    image[2:10, 2:14, :] = 100
    image[2:6, 8:14, 3] = 300  # left front in slice 3
    packed = sprites.packVolumes({'flair': image}, np.zeros(image.shape, np.uint8), None, (8, 8, 8))
    width, height, depth = packed['coarse']
    assert (width, height, depth) == (12, 16, 5) and packed['hasTruth'] is False
    picture = imageOf(packed['images']['flair']).astype(int)
    row, column = divmod(3, packed['columns'])
    tile = picture[row * height : (row + 1) * height, column * width : (column + 1) * width]
    assert tile[4, 4] > 200 and tile[4, 8] < 60 and tile[12, 4] < 60  # bright only at the left front


def test_packVolumes_ofNothingIsTheWhole():
    """Neither brain nor tumor: the whole volume, no labels."""
    packed = sprites.packVolumes({'flair': np.zeros((6, 5, 4))}, np.zeros((6, 5, 4), np.uint8), None, (1, 1, 1))
    assert packed['size'] == [6, 5, 4] and packed['labelSize'] == [0, 0, 0]


def test_drawThumbnail_showsTheClassWhereItLies():
    """Edema in the patient's right front is yellow in the upper right of the picture; the shape follows the mm."""
    classes = np.zeros((20, 20, 3), np.uint8)
    classes[12:, 12:, 1] = 2
    image = np.ones((20, 20, 3))
    uri = sprites.drawThumbnail(image, classes, (1, 2, 1), side=80)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(',')[1]))).convert('RGB')).astype(int)
    assert picture.shape == (80, 40, 3)
    assert picture[15, 32, 0] - picture[15, 32, 2] > 80 and abs(picture[60, 10, 0] - picture[60, 10, 2]) < 10
