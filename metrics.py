"""Score a segmentation: pooled counts."""

import numpy as np
import pandas as pd

import config


def computeMetrics(TP, FP, FN, TN):
    """Prints and gives the pooled scores of the three tumor classes.

    Pooled means: the voxels of all patients are counted together, as if they were one patient. A patient with a large
    tumor weighs more than one with a small tumor, and Dice = 2 P R / (P + R), IoU = Dice / (2 - Dice) always hold.

    Args:
        TP, FP, FN, TN: class-wise counts of voxels, shape (4,), tensors or arrays of whole numbers. Class 0 is counted
            but not reported.

    Returns:
        DataFrame with the rows of the classes 1 to 3 and the columns `Precision`, `Recall`, `Accuracy`, `IoU score`,
        `DICE score`, 0 to 1. A score without a single voxel to tell (0 / 0, as the recall of a class that no patient
        has) is NaN.

    Raises:
        ValueError: other shapes, or a negative count.
    """
    counts = [np.asarray(count, dtype=float) for count in (TP, FP, FN, TN)]
    for name, count in zip(('TP', 'FP', 'FN', 'TN'), counts, strict=True):
        if count.shape != (config.NO_CLASSES,) or (count < 0).any():
            raise ValueError(f'{name} is {count}; {config.NO_CLASSES} counts were expected, one a class.')
    TP, FP, FN, TN = (count[1:] for count in counts)
    with np.errstate(invalid='ignore'):  # 0 / 0 is NaN, as said above
        scores = {
            'Precision': TP / (TP + FP),
            'Recall': TP / (TP + FN),
            'Accuracy': (TP + TN) / (TP + FP + FN + TN),
            'IoU score': TP / (TP + FP + FN),
            'DICE score': 2 * TP / (2 * TP + FP + FN),
        }
    table = pd.DataFrame(scores, index=pd.Index(config.CLASS_NAMES[1:], name='class'))
    print('Pooled over all voxels of all patients (large tumors weigh more than small ones):')
    print(table.to_string(float_format='{:.3f}'.format))
    return table
