"""Build functions that damage one patient's files; each takes the patient's folder and id."""

import gzip

import nibabel as nib
import numpy as np

from conftest import save


def changeVolume(column, change, affine=None):
    """Rewrite one file with what `change` makes of its array."""

    def damage(home, patient):
        file = home / f'{patient}_{column}.nii.gz'
        save(change(np.asarray(nib.load(file).dataobj)), file, affine)

    return damage


def changeVoxel(column, value, dtype=np.float32, where=(5, 5, 5)):
    """Set a voxel, or several, after a conversion to another dtype."""

    def change(volume):
        volume = volume.astype(dtype)
        volume[where] = value
        return volume

    return changeVolume(column, change)


def changeBytes(column, change):
    """Rewrite one file with what `change` makes of its bytes."""

    def damage(home, patient):
        file = home / f'{patient}_{column}.nii.gz'
        file.write_bytes(change(file.read_bytes()))

    return damage


def invertByte(fraction):
    """Return a change of one byte, at a fraction of the length."""

    def change(packed):
        place = int(fraction * len(packed))
        return packed[:place] + bytes([packed[place] ^ 0xFF]) + packed[place + 1 :]

    return change


def changeHeader(column, field, value):
    """Set a field of the NIfTI header, as nibabel would not."""

    def change(packed):
        content = gzip.decompress(packed)
        header = np.frombuffer(bytearray(content[:348]), nib.Nifti1Header.template_dtype)
        header[field] = value
        return gzip.compress(header.tobytes() + content[348:])

    return changeBytes(column, change)


def copy(one, other):
    """Replace one file by another of the same patient."""

    def damage(home, patient):
        (home / f'{patient}_{other}.nii.gz').write_bytes((home / f'{patient}_{one}.nii.gz').read_bytes())

    return damage


def remove(column):
    """Delete one file."""
    return lambda home, patient: (home / f'{patient}_{column}.nii.gz').unlink()


def turn(volume):
    """Return a volume with its first two axes backwards, as `TURNED` says."""
    return volume[::-1, ::-1]


TURNED = np.array([[-1, 0, 0, 11], [0, -1, 0, 12], [0, 0, 1, 0], [0, 0, 0, 1]])
SHIFTED = nib.affines.from_matvec(np.eye(3), [0, 3, 0])
BAD = {  # kind -> column, words of the finding (regular expression), function that damages the patient
    'missing modality': ('t2', 'this modality is missing', remove('t2')),
    'empty file': ('flair', 'cannot be used', changeBytes('flair', lambda packed: b'')),
    'cut in the header': ('flair', 'cannot be used', changeBytes('flair', lambda packed: packed[:60])),
    'cut in the data': ('flair', 'cannot be used', changeBytes('flair', lambda packed: packed[:900])),
    'an early byte inverted': ('t1ce', 'cannot be used', changeBytes('t1ce', invertByte(0.3))),
    'a late byte inverted': ('t1ce', 'cannot be used', changeBytes('t1ce', invertByte(0.8))),
    'an unknown data type': ('t1ce', 'cannot be used', changeHeader('t1ce', 'datatype', 0)),
    'an affine without a first axis': ('t1ce', 'cannot be used', changeHeader('t1ce', 'srow_x', (0, 0, 0, 0))),
    'text for an image': ('t1ce', 'cannot be used', changeBytes('t1ce', lambda packed: b'this is no NIfTI')),
    'a header of terabytes': (
        't2',
        r'says \(30000, 30000, 2000\)',
        changeHeader('t2', 'dim', (3, 30000, 30000, 2000, 1, 1, 1, 1)),
    ),
    'a header of one slice more': ('t2', 'cannot be used', changeHeader('t2', 'dim', (3, 12, 13, 15, 1, 1, 1, 1))),
    'a 2-D image': ('t2', r'header says \(12, 13\); 3 dimensions', changeVolume('t2', lambda v: v[..., 0])),
    'a 4-D image': ('t2', r'\(12, 13, 14, 2\); 3 dim', changeVolume('t2', lambda v: np.stack([v, v], axis=-1))),
    'another shape': ('t2', r'has \(11, 13, 14\) voxels, t1ce has \(12,', changeVolume('t2', lambda v: v[1:])),
    'a seg of another shape': ('seg', r'has \(12, 13, 13\) voxels', changeVolume('seg', lambda v: v[..., 1:])),
    'another place': ('flair', 'lies up to 3.0 mm away from t1ce', changeVolume('flair', lambda v: v, SHIFTED)),
    'a seg at another place': ('seg', 'lies up to 3.0 mm away', changeVolume('seg', lambda v: v, SHIFTED)),
    'NaN': ('flair', 'values run from nan to nan; finite values', changeVoxel('flair', np.nan)),
    'infinite': ('flair', 'to inf; finite values', changeVoxel('flair', np.inf)),
    'minus infinite': ('flair', 'from -inf', changeVoxel('flair', -np.inf)),
    'beyond any scanner': ('flair', 'values within 1e6', changeVoxel('flair', 2e6)),
    'below any scanner': ('flair', 'values within 1e6', changeVoxel('flair', -2e6)),
    'NaN in the seg': ('seg', 'finite values', changeVoxel('seg', np.nan)),
    'a label of another edition': ('seg', r'labels \[0, 3, 4\], but BraTS2020 knows', changeVoxel('seg', 3, np.uint8)),
    'a negative label': ('seg', r'labels \[-1, 0, 4\]', changeVoxel('seg', -1, np.int16)),
    'a label between two': ('seg', 'values between the labels', changeVoxel('seg', 1.5)),
    'an image for a seg': ('seg', 'but BraTS2020 knows', copy('t1', 'seg')),
}
SUSPICIOUS = {  # the same, but such a patient can be read
    'no tumor': ('seg', 'no voxel of tumor', changeVolume('seg', np.zeros_like)),
    'an empty modality': ('t2', 'every voxel is 0: this modality is empty', changeVolume('t2', np.zeros_like)),
    'a constant modality': ('t2', 'every voxel is 7', changeVolume('t2', lambda v: np.full_like(v, 7))),
    'a seg for an image': ('t2', 'like a segmentation; an image was expected', copy('seg', 't2')),
    'clipped voxels': ('t2', '^5 voxels are 32767', changeVoxel('t2', 32767, np.int16, np.s_[3, 3, 3:8])),
    'tumor outside the brain': ('seg', '^3 voxels of tumor lie', changeVoxel('seg', 4, np.uint8, np.s_[0, 0, :3])),
    'a copy of another modality': ('flair', 'flair looks like a copy of t1ce', copy('t1ce', 'flair')),
    "another patient's seg": ('seg', 'tumor lies outside the brain', changeVolume('seg', lambda v: np.roll(v, 8, 0))),
    'an image in another order': ('t2', 'in LPS order, t1ce in RAS', changeVolume('t2', turn, TURNED)),
    'a seg in another order': ('seg', 'LPS order.*corrected when it is read', changeVolume('seg', turn, TURNED)),
}
