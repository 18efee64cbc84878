import subprocess
import sys

import pytest

import config


def test_config_followsWhatIsAssigned():
    """What is derived follows the value it is derived from, until it is assigned itself."""
    config.OUTPUT_FOLDER, config.MODALITIES = 'somewhere', ('t1', 'flair')
    assert config.TRAIN_FILE == 'somewhere/train.h5' and config.BEST_CHECKPOINT == 'somewhere/best.pt'
    assert config.ENCODER_IN_CHANNEL == 2
    config.TRAIN_FILE = 'mine.h5'
    assert config.TRAIN_FILE == 'mine.h5'


def test_config_findsTheFolderInTheEnvironment(tmp_path, monkeypatch):
    """BRATS_FOLDER is the data folder of a process that starts with it."""
    code = 'import config; print(config.DATA_FOLDER)'
    monkeypatch.setenv('BRATS_FOLDER', str(tmp_path))
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd='.')
    assert found.stdout.strip() == str(tmp_path)


def test_config_importsNothingHeavy():
    """Importing config neither imports torch nor touches a device: loader workers import it."""
    code = 'import config, sys; print("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == 'False'


def test_config_refusesAnUnknownName():
    """A name that config does not have is an AttributeError, so a typing error does not pass."""
    with pytest.raises(AttributeError, match='BATCH_SIZE'):
        _ = config.BATCH_SIZE
