"""Show a patient in an interactive viewer in the notebook."""

from pathlib import Path

import ipywidgets
import numpy as np
from matplotlib.colors import to_rgba_array

import config
from patients.editions import classesOf, countWithCavity, known
from patients.reading import detectEdition, fileOf, hasFile
from pictures.figure import OPACITY, classColors, classNames, shownChannel


def viewPatient(paths, segmentation=None):
    """Return a viewer of a patient's image with truth and prediction over it, each with its own opacity.

    It needs ipyniivue, whose JavaScript is in its wheel, so that it works without internet. Where it is not installed,
    a sentence says so, and the notebook goes on.

    Args:
        paths: row of the file list.
        segmentation: path of a prediction in the labels of the patient's edition, `.nii.gz` or `.nii`; None: only image
            and truth are shown.

    Returns:
        ipywidgets.VBox; None if ipyniivue is not installed.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the files are 4-D (Decathlon).
    """
    edition = detectEdition(paths)
    if known()[edition].channels:
        raise ValueError(f'{paths.name}: the viewer shows files with one volume, these have one for each modality.')
    modality = config.MODALITIES[shownChannel(len(config.MODALITIES))]
    image = fileOf(paths, modality)
    overlays = {'truth': fileOf(paths, 'seg')} if hasFile(paths, 'seg') else {}
    if segmentation is not None:
        if not Path(segmentation).is_file():
            raise FileNotFoundError(f'{segmentation} does not exist; utils.saveSegmentation writes it.')
        overlays['prediction'] = Path(segmentation)
    try:
        from ipyniivue import NiiVue, SliceType
    except ImportError:
        print('No interactive viewer: "pip install ipyniivue", restart the kernel and run this cell again to see one.')
        return None
    viewer = NiiVue(height=420)
    viewer.set_slice_type(SliceType.MULTIPLANAR)
    viewer.opts.is_radiological_convention = False  # the patient's right on the viewer's right
    viewer.load_volumes([{'path': image}, *({'path': file, 'opacity': OPACITY} for file in overlays.values())])
    sliders = []
    for name, volume in zip(overlays, viewer.volumes[1:], strict=True):
        volume.set_colormap_label(_labelColors(edition))
        slider = ipywidgets.FloatSlider(OPACITY, min=0, max=1, step=0.05, description=name)
        ipywidgets.link((slider, 'value'), (volume, 'opacity'))
        sliders.append(slider)
    return ipywidgets.VBox([ipywidgets.HBox(sliders), viewer])


def _labelColors(edition):
    """Return NiiVue's table of colors and names of an edition's labels; background is transparent."""
    numbers = classesOf(edition, countWithCavity())
    labels = sorted(numbers)
    colors = np.rint(255 * to_rgba_array([classColors()[numbers[label]] for label in labels])).astype(int)
    colors[:, 3] = [255 if numbers[label] else 0 for label in labels]
    names = [classNames()[numbers[label]] for label in labels]
    return dict(zip('RGBA', colors.T.tolist(), strict=True)) | {'I': labels, 'labels': names}
