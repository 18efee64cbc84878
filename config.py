"""The settings of a run, in the order in which the data meets them. Change them before you call other modules."""

import functools
import os
import re
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036
    raise ImportError(f'Python 3.11 or newer is needed; this is {sys.version.split()[0]}.')

# Patients. DATA_FOLDER and OUTPUT_FOLDER are found when they are read, unless they are set. DATA_FOLDER is the
# environment variable BRATS_FOLDER, else /kaggle/input if it holds files of BraTS, else None. OUTPUT_FOLDER is
# /kaggle/working, else a mounted Drive on Colab, else the current folder.
EDITION = None  # such as 'BraTS2020', if the file names do not tell it; None: detected from the names
OWN_EDITIONS = {}  # name -> patients.Edition of a data set of your own, or a dict of its fields, see docs/own_data.md
MODALITIES = ('t1ce', 't2', 'flair')  # the model's channels, in this order; t1 adds little
SEED = 0  # of the split, the background patches and the training
VAL_FRACTION = 0.15  # of the subjects with a segmentation; validated on after each epoch; 0: none
TEST_FRACTION = 0.15  # of the same subjects; scored once, at the end; 0: none

# Patches. TRAIN_FILE and VAL_FILE lie in OUTPUT_FOLDER.
PLANES = ('axial', 'coronal', 'sagittal')  # one model learns all; predictions are averaged. Of thick slices only one
SLICE_STEP = 3  # every third slice of each plane, as neighbours look alike; the first is drawn per patient
PATCH_SIZE = 128  # pixels, both axes; a multiple of 2 ** ENCODER_DEPTH
# Pixels from one window to the next, at most PATCH_SIZE. The last window ends at the edge of the slice, so that nothing
# is left out: windows start at 0 and 112 along 240 pixels, at 0, 112 and 128 along 256.
PATCH_STRIDE = 112
RANDOM_STARTS = True  # the same number of windows, but at starts drawn per slice: a tumor is cut in many ways
PREPROCESS_WORKERS = 2  # threads that read and cut patients; each holds one patient, about 0.4 GB
ON_BAD_PATIENT = 'stop'  # or 'leaveOut': patients whose files cannot be used are left out and named
BACKGROUND_SHARE = None  # fraction of the brain patches without tumor to keep; None: 0.1, more if few slices have any
STRETCH_PERCENTILES = (0.5, 99.5)  # of the brain's intensities, mapped to STRETCH_RANGE; the rest is clipped
STRETCH_RANGE = (-1, 1)  # the background becomes the lower end

# Augmentation, in torchio's terms
SPATIAL_PROBABILITY = 0.95  # that one of the four below is applied, drawn by these weights
FLIP_WEIGHT = 0.35
AFFINE_WEIGHT = 0.35
ANISOTROPY_WEIGHT = 0.15
ELASTIC_WEIGHT = 0.15
FLIP_AXES = (0, 1)
FLIP_PROBABILITY = 0.5  # of each axis, once a flip is drawn
AFFINE_SCALES = 0.1  # 0.9 to 1.1 along each axis
AFFINE_DEGREES = (0, 0, 0, 0, -20, 20)  # within the slice only: other rotations would leave it
ANISOTROPY_AXES = (0, 1)
ANISOTROPY_DOWNSAMPLING = (1.5, 2.5)
ELASTIC_DISPLACEMENT = (2, 2, 0)  # pixels along each axis, largest displacement of a control point
CONTRAST_PROBABILITY = 0.8  # that gamma, contrast and brightness of each modality change; 0: never
# largest abs(log(gamma)), abs(contrast - 1) and brightness, the last as a fraction of STRETCH_RANGE
CONTRAST = (0.5, 0.25, 0.1)
INTENSITY_PROBABILITY = 0.95  # that one of the two below is applied, with equal odds
NOISE_STD = 0.1  # largest standard deviation, on the scale of STRETCH_RANGE
BIAS_COEFFICIENTS = 0.1  # largest coefficient of the bias field's polynomial
MODALITY_DROPOUT = 0.0  # probability that a patch is shown without a modality, each on its own, but never all

# Loading
BATCHSIZE = 32  # patches; fits a 16 GB card with a resnet34
CACHE_PATCHES = 0.45  # of the machine's memory; patch files up to this size are held in memory, shared by the workers
LOADER_WORKERS = 2  # processes; Colab has 2 cores, Kaggle 4

# Model. ENCODER_IN_CHANNEL is the number of MODALITIES. CLASS_NAMES, CLASS_COLORS and REGIONS (name -> its classes, for
# the scores) follow from NO_CLASSES if it is 2, 4 or 5; set them too if it is another number.
ENCODER_NAME = 'resnet34'
ENCODER_WEIGHTS = 'imagenet'  # downloaded once; without internet the encoder starts from random weights, with a message
ENCODER_DEPTH = 5
START = None  # 'glioma', the weights in the box, or a folder of deploy.packModel: the training begins from them
DECODER_CHANNELS = (256, 128, 64, 32, 16)
NO_CLASSES = 4  # 5: the resection cavity is class 4, not background; 2: all tumor is class 1

# Training. DEVICE is 'cuda' if a GPU computes in a trial, else 'mps' or 'cpu'. TIME_BUDGET is the hours, counted from
# the start of the process, in which the training has to end: 8.5 on Kaggle, where sessions end after 9 or 12 hours,
# else None. If not all steps fit, a 'poly' schedule is shortened; a run with 'plateau' stops and can be resumed.
# PATIENCE is the number of epochs without a better validation loss after which training stops: 10 for 'plateau', None
# for 'poly'.
LOSS = 'dice+ce'  # or 'focal'
LOSS_GAMMA = 2.0  # of the focal loss: larger values weigh easy pixels less
LEARN_RATE = 1e-3  # of Adam; the schedule lowers it
WEIGHT_DECAY = 1e-5
GRADIENT_CLIP = 1.0  # largest norm of the whole gradient, so that a rare bad batch does not undo an epoch
SCHEDULE = 'poly'  # the learning rate rises for WARMUP steps, then falls to 0 at the last step; or 'plateau'
WARMUP = 50  # steps
POLY_POWER = 0.9  # exponent of the decay; 1: a straight line
SCHEDULER_FACTOR = 0.5  # of 'plateau': what the learning rate is multiplied by
SCHEDULER_PATIENCE = 3  # of 'plateau': epochs without a better validation loss before the rate falls
AVERAGE = 0.05  # horizon of the moving average of the weights, as a fraction of all steps; 0: none
EPOCHS = 30
STEPS = None  # batches of the whole training, whatever the number of patches; EPOCHS then follows from it

# Checkpoints. LAST_CHECKPOINT, BEST_CHECKPOINT (the lowest validation loss) and history.csv lie in OUTPUT_FOLDER.
# RESULT_CHECKPOINT is the one to predict with: the last one for 'poly', whose learning rate has fallen to 0, the best
# one for 'plateau'.

# Prediction
PREDICT_BATCH = 64  # patches of PATCH_SIZE x PATCH_SIZE per forward pass; bounds the memory

# Scores. By default, patients are scored as in BraTS 2020 and lesions as in 2023; metrics/rules.py has the others.
MAIN_REGIONS = ('WT', 'TC', 'ET')  # that the challenge ranks by; those of them in REGIONS are scored
HD95_EMPTY = {'challenge': 373.12866, 'surface-distance': 374.0, 'pooled': 373.0}  # mm, if one mask is empty
CONFIDENCE = 0.95  # level of the confidence interval of a mean
BOOTSTRAP_RESAMPLES = 10_000  # for this interval
QUALITY_LEVEL = 0.9  # probability that the true Dice lies in the interval of its estimate
QUALITY_LIMIT = 0.7  # Dice; patients with a lower estimate are flagged

# The simple recipe that docs/recipes.md calls "document". Use it by vars(config).update(config.DOCUMENT); the other
# settings stay as above. The original clips no gradient, but only a bad batch reaches GRADIENT_CLIP.
DOCUMENT = {
    'PLANES': ('axial',),
    'SLICE_STEP': 1,
    'RANDOM_STARTS': False,
    'BACKGROUND_SHARE': 0.0,
    'FLIP_PROBABILITY': 1.0,  # always both axes
    'LOSS': 'focal',
    'SCHEDULE': 'plateau',
    'AVERAGE': 0.0,
    'CONTRAST_PROBABILITY': 0.0,
}

# The demo, without BraTS: phantoms, and settings for two CPU cores. The notebook uses them in place of the above.
DEMO = {
    'DATA_FOLDER': 'demo/phantoms',
    'OUTPUT_FOLDER': 'demo',  # not where real runs are
    'ENCODER_NAME': 'resnet18',
    'DECODER_CHANNELS': (64, 32, 16, 16, 16),
    'SLICE_STEP': 4,
    'BATCHSIZE': 8,
    'EPOCHS': 2,
    'LOADER_WORKERS': 0,  # starting workers would take a fifth of so small an epoch
}
DEMO_PATIENTS = 10
DEMO_SHAPE = (160, 160, 104)  # voxels of a phantom; (240, 240, 155) is that of BraTS


def _findDataFolder():
    return os.environ.get('BRATS_FOLDER') or _findOnKaggle()


@functools.cache
def _findOnKaggle():
    # the names exclude results of earlier runs and their phantoms
    # .h5: single slices of BraTS 2020; patients.makeFileList says why they cannot be used
    isBrats = re.compile(r'^(?!.*/phantoms/).*([_-](flair|t2f)\.nii|/imagesT[rs]/BRATS_|\.h5$)', re.IGNORECASE)
    kaggle = Path('/kaggle/input')
    patterns = ('*.nii*', 'volume_*_slice_*.h5')
    files = (path for pattern in patterns for path in kaggle.rglob(pattern))
    return next((str(kaggle) for path in files if isBrats.match(str(path))), None)


@functools.cache
def _findOutputFolder():
    if Path('/kaggle/working').is_dir():
        return '/kaggle/working'
    drive = Path('/content/drive/MyDrive')
    return str(drive / 'brats_segmentation') if drive.is_dir() else '.'


@functools.cache
def _findDevice():
    import torch

    if torch.cuda.is_available():
        try:
            # is_available() is True even on cards that this build has no kernels for: run one
            (torch.ones(8, 8, device='cuda') @ torch.ones(8, 8, device='cuda')).sum().item()
            return 'cuda'
        except RuntimeError as error:
            name = torch.cuda.get_device_name()
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f'The {name} cannot run this build of torch ({torch.__version__}): {reason}.')
            print('On Kaggle choose the accelerator GPU T4 x2 instead of the P100. The CPU is used instead, slowly.')
            return 'cpu'
    return 'mps' if torch.backends.mps.is_available() else 'cpu'


CAVITY_CLASS = ('resection cavity', '#B8A0F0')  # name and color of class 4
_CLASSES = (  # name and color of each class; color-blind readers can tell them apart, and from grey
    ('background', '#000000'),
    ('necrotic core', '#2F6BFF'),
    ('edema', '#F0E442'),
    ('enhancing tumor', '#E0301E'),
    CAVITY_CLASS,
)


def _findClasses(column):
    if NO_CLASSES == 2:
        return (_CLASSES[0][column], ('tumor', _CLASSES[3][1])[column])
    if NO_CLASSES not in (4, 5):
        raise ValueError(
            f'config.NO_CLASSES is {NO_CLASSES}; 2, 4 or 5 was expected. With another number set config.CLASS_NAMES, '
            'CLASS_COLORS and REGIONS too.'
        )
    return tuple(row[column] for row in _CLASSES[:NO_CLASSES])


def _findRegions():
    if NO_CLASSES == 2:
        return {'WT': (1,)}
    _findClasses(0)  # raises a ValueError for other numbers
    regions = {'WT': (1, 2, 3), 'TC': (1, 3), 'ET': (3,), 'NCR': (1,), 'ED': (2,), 'RC': (4,)}
    return {name: classes for name, classes in regions.items() if max(classes) < NO_CLASSES}


def _inOutputFolder(name):
    # through the module, so that __getattr__ finds OUTPUT_FOLDER if it is not set
    return lambda: os.path.join(sys.modules[__name__].OUTPUT_FOLDER, name)


# Found each time they are read; a value assigned to the name overrides it.
_FOUND = {
    'DATA_FOLDER': _findDataFolder,
    'OUTPUT_FOLDER': _findOutputFolder,
    'TRAIN_FILE': _inOutputFolder('train.h5'),
    'VAL_FILE': _inOutputFolder('val.h5'),
    'ENCODER_IN_CHANNEL': lambda: len(MODALITIES),
    'CLASS_NAMES': lambda: _findClasses(0),
    'CLASS_COLORS': lambda: _findClasses(1),
    'REGIONS': _findRegions,
    'DEVICE': _findDevice,
    'TIME_BUDGET': lambda: 8.5 if Path('/kaggle/working').is_dir() else None,
    'LAST_CHECKPOINT': _inOutputFolder('last.pt'),
    'BEST_CHECKPOINT': _inOutputFolder('best.pt'),
    'RESULT_CHECKPOINT': lambda: getattr(
        sys.modules[__name__], 'BEST_CHECKPOINT' if SCHEDULE == 'plateau' else 'LAST_CHECKPOINT'
    ),
    'PATIENCE': lambda: 10 if SCHEDULE == 'plateau' else None,
}


def reset():
    """Set all numbers to those of this file."""
    values = vars(sys.modules[__name__])
    for name in _FOUND.keys() & values.keys():
        del values[name]
    values.update(_defaults)
    for found in (_findOnKaggle, _findOutputFolder):
        found.cache_clear()  # data or Drive may have been added since


def __dir__():
    """Return the names of all settings, also of those in `_FOUND`."""
    return sorted({*globals(), *_FOUND})


def __getattr__(name):
    """Return a setting of `_FOUND` that was not assigned (PEP 562)."""
    if name in _FOUND:
        return _FOUND[name]()
    raise AttributeError(f'config has no {name}')


_defaults = {name: value for name, value in vars().items() if name.isupper() and not name.startswith('_')}
