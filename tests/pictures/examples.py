"""Small inputs and readers that the tests of several figures share."""

import matplotlib
import pandas as pd
import torch

matplotlib.use('Agg')


def makePrediction():
    """Return x (4, 3, 20, 24), y and yhat (4, 20, 24): brain in slices 1 and 2, all kinds of error in slice 2."""
    x, y = torch.full((4, 3, 20, 24), -1.0), torch.zeros(4, 20, 24, dtype=torch.int64)
    x[1:3, :, 2:18, 3:21] = torch.linspace(-0.9, 1, 16)[:, None]
    y[1, 5, 5] = 1
    y[2, 10:14, 10] = torch.tensor([1, 2, 3, 3])
    yhat = y.clone()
    yhat[2, 10:12, 10] = 0  # two false negatives
    yhat[2, 12, 10] = 2  # one wrong class
    yhat[2, 3:6, 4] = 2  # three false positives
    return x, y, yhat


def makeTable(**dice):
    """Return a table like that of `scoreTable`: the Dice of patients a, b, c, ... by region, volumes of 2 ml."""
    rows = []
    for region, values in dice.items():
        for number, value in enumerate(values):
            score = {'dice': value, 'hd95': 10 * (1 - value), 'volumeTruth': 2.0, 'volumePredicted': 2.0}
            rows.append({'patient': chr(ord('a') + number), 'region': region, **score})
    return pd.DataFrame(rows)


def linesOf(panel, label):
    """Return the lines of a panel that have a label."""
    return [line for line in panel.lines if line.get_label() == label]


def legendTexts(owner):
    """Return the texts in the legend of a figure or of a panel."""
    legend = owner.legends[0] if hasattr(owner, 'legends') else owner.get_legend()
    return [text.get_text() for text in legend.get_texts()]
