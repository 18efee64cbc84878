"""Test the interactive viewer, as far as it goes without a browser."""

import sys

import numpy as np
import pandas as pd
import pytest

import config
import pictures


@pytest.fixture
def paths(writeCase):
    label = np.zeros((6, 5, 4), np.uint8)
    files = writeCase({'t1ce': label + 1, 't2': label + 1, 'flair': label + 1, 'seg': label})
    return pd.Series(files, name='BraTS20_Training_001')


def test_viewPatient_showsImageTruthAndPredictionInTheEditionsLabels(paths):
    """Three volumes; label 4 of 2020 is enhancing tumor in its color; a slider sets the opacity of its overlay."""
    pytest.importorskip('ipyniivue')
    sliders, viewer = pictures.viewPatient(paths, paths['seg']).children
    assert [str(volume.path) for volume in viewer.volumes] == [paths['flair'], paths['seg'], paths['seg']]
    table = viewer.volumes[1].colormap_label
    assert (
        table.labels[4] == 'enhancing tumor' and table.lut[16:] == [224, 48, 30, 255] and table.lut[:4] == [0, 0, 0, 0]
    )
    assert [slider.description for slider in sliders.children] == ['truth', 'prediction']
    sliders.children[1].value = 0.2
    assert viewer.volumes[2].opacity == 0.2 and viewer.volumes[1].opacity != 0.2


def test_viewPatient_leavesTheCavityOutWithTwoClasses(writeCase):
    """Tumor or not: label 4 of 2024, which is background then, is as transparent as label 0."""
    pytest.importorskip('ipyniivue')
    config.NO_CLASSES, config.EDITION, label = 2, 'BraTS2024', np.zeros((6, 5, 4), np.uint8)
    files = writeCase({'flair': label + 1, 'seg': label}, 'patient')
    _, viewer = pictures.viewPatient(pd.Series(files, name='patient')).children
    assert [viewer.volumes[1].colormap_label.lut[4 * label + 3] for label in range(5)] == [0, 255, 255, 255, 0]


def test_viewPatient_goesOnWithoutItsLibrary(paths, monkeypatch, capsys):
    """Without ipyniivue a sentence says what to install, and nothing is raised."""
    monkeypatch.setitem(sys.modules, 'ipyniivue', None)
    assert pictures.viewPatient(paths) is None
    assert 'pip install ipyniivue' in capsys.readouterr().out


def test_viewPatient_namesAMissingPrediction(paths):
    """A path of a prediction without a file is an error that names it."""
    with pytest.raises(FileNotFoundError, match=r'nowhere\.nii'):
        pictures.viewPatient(paths, 'nowhere.nii')
