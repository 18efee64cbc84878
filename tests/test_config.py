import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config

HOME = Path(config.__file__).parent


def test_config_derivesValuesFromWhatIsAssigned():
    """A derived value follows the one it is derived from, until it is assigned itself."""
    config.OUTPUT_FOLDER, config.MODALITIES = 'somewhere', ('t1', 'flair')
    assert config.TRAIN_FILE == 'somewhere/train.h5' and config.BEST_CHECKPOINT == 'somewhere/best.pt'
    assert config.ENCODER_IN_CHANNEL == 2
    config.TRAIN_FILE = 'mine.h5'
    assert config.TRAIN_FILE == 'mine.h5'


def test_config_predictsWithTheEndOfADecay():
    """The last weights are the result where the rate decays by the step; the best epoch, and patience, at a plateau."""
    config.OUTPUT_FOLDER, config.SCHEDULE = 'somewhere', 'poly'
    assert config.RESULT_CHECKPOINT == 'somewhere/last.pt' and config.PATIENCE is None
    config.SCHEDULE = 'plateau'
    assert config.RESULT_CHECKPOINT == 'somewhere/best.pt' and config.PATIENCE == 10
    config.BEST_CHECKPOINT = 'mine.pt'
    assert config.RESULT_CHECKPOINT == 'mine.pt'


def test_config_findsTheFolderInTheEnvironment(tmp_path, monkeypatch):
    """BRATS_FOLDER is the data folder of a process that starts with it."""
    code = 'import config; print(config.DATA_FOLDER)'
    monkeypatch.setenv('BRATS_FOLDER', str(tmp_path))
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=HOME)
    assert found.stdout.strip() == str(tmp_path)


def test_config_findsAFolderThatIsSetLater(monkeypatch, tmp_path):
    """BRATS_FOLDER is read each time, so that it may be set after an error."""
    assert str(tmp_path) != config.DATA_FOLDER
    monkeypatch.setenv('BRATS_FOLDER', str(tmp_path))
    assert str(tmp_path) == config.DATA_FOLDER


def test_config_listsWhatItFinds():
    """dir() names the values that are found, and so does the settings.json of a folder of results."""
    assert {'DEVICE', 'TRAIN_FILE', 'LAST_CHECKPOINT', 'EPOCHS'} <= set(dir(config))


def test_config_importsNothingHeavy():
    """Importing config neither imports torch nor touches a device: loader workers import it."""
    code = 'import config, sys; print("torch" in sys.modules)'
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=HOME)
    assert found.stdout.strip() == 'False'


def test_config_refusesAnUnknownName():
    """A name that config does not have is an AttributeError, so a misspelled one is noticed."""
    with pytest.raises(AttributeError, match='BATCH_SIZE'):
        _ = config.BATCH_SIZE


def test_findDevice_recommendsAnotherCardIfThisOneHasNoKernels(monkeypatch, capsys):
    """A card that is there but runs no kernel of this build: the CPU, and a message that says what to choose."""

    def fail(*args, **options):
        raise RuntimeError('CUDA error: no kernel image is available for execution on the device\nmore')

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Tesla P100-PCIE-16GB')
    monkeypatch.setattr(torch, 'ones', fail)
    assert config._findDevice.__wrapped__() == 'cpu'
    printed = capsys.readouterr().out
    assert 'Tesla P100' in printed and 'no kernel image' in printed and 'choose the accelerator GPU T4' in printed


@pytest.mark.parametrize(('cuda', 'mps', 'device'), [(False, True, 'mps'), (False, False, 'cpu'), (True, True, 'cuda')])
def test_findDevice_triesCudaThenMpsThenCpu(monkeypatch, cuda, mps, device):
    """A card that computes comes first, then Apple's mps, then the CPU; the name is a string."""
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
    monkeypatch.setattr(torch, 'ones', lambda *size, device: ones(*size))
    assert config._findDevice.__wrapped__() == device


def test_reset_findsDataThatWasAddedSince(monkeypatch):
    """BraTS that is attached to a running session is found once the numbers are reset, as the notebook does."""
    files = []
    monkeypatch.delenv('BRATS_FOLDER', raising=False)
    monkeypatch.setattr(Path, 'rglob', lambda self, pattern: iter(files))
    config.reset()
    assert config.DATA_FOLDER is None
    files.append(Path('/kaggle/input/brats/BraTS20_Training_001_flair.nii'))
    config.reset()
    assert config.DATA_FOLDER == '/kaggle/input'
    files.clear()
    config.reset()


def test_reset_undoesTheDemo():
    """After the demo and a folder of one's own, all numbers are those of the file, and folders are found again."""
    config.reset()  # what the tests set
    before = {name: getattr(config, name) for name in dir(config) if name.isupper()}
    assert before['EPOCHS'] == 30
    vars(config).update({**config.DEMO, 'STEPS': 7, 'LAST_CHECKPOINT': 'x.pt', 'DATA_FOLDER': 'own'})
    config.reset()
    assert {name: getattr(config, name) for name in before} == before
