"""What must not be mixed cannot be mixed: patch files, checkpoints, folds and predictions of different runs."""

import gzip
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
import torchio as tio

import checkpoints
import config
import engine
import metrics
import phantom
import postprocess
import preprocess
import provenance
import transforms
import utils
from conftest import save as saveVolume
from conftest import writePatchFile

SCALER = torch.amp.GradScaler('cuda', enabled=False)


def makeFile(name, patients=('P1', 'P2'), **changes):
    """Write a patch file of a few random patches and return its path."""
    generator = np.random.default_rng(0)
    image = generator.uniform(-1, 1, (4, len(config.MODALITIES), 32, 32)).astype(np.float16)
    label = generator.integers(0, 4, (4, 32, 32)).astype(np.uint8)
    return writePatchFile(Path(config.OUTPUT_FOLDER, name), image, label, patients, **changes)


def makeModel():
    torch.manual_seed(0)
    config.ENCODER_NAME, config.ENCODER_DEPTH, config.DECODER_CHANNELS = 'resnet18', 3, (16, 8, 8)
    return engine.makeModel()


def trainOn(file, model=None, criterion=None):
    """Train a model for one epoch on a patch file and return it with its optimizer."""
    model = makeModel() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=config.LEARN_RATE)
    loader = torch.utils.data.DataLoader(utils.BRATSDataset(file), 2)
    engine.train(model, criterion or torch.nn.CrossEntropyLoss(), optimizer, SCALER, loader)
    return model, optimizer


def save(model, optimizer, epoch=0):
    checkpoints.makeCheckpoint(epoch, model, optimizer, None, SCALER, 1.0, 1.0, float('inf'))


@pytest.fixture
def df(tmp_path):
    """The file list of three phantoms."""
    phantom.makeCases(tmp_path / 'data', 3, shape=(40, 40, 16))
    return utils.makeFileList(tmp_path / 'data')


# Training


def test_train_notesWhatTheModelHasSeen():
    """After an epoch the model holds the identity of its patch file, also through a Subset of it."""
    dataset = utils.BRATSDataset(makeFile('train.h5'))
    model = makeModel()
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, [0, 2]), 2)
    engine.train(model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1), SCALER, loader)
    assert model.provenance['patients'] == dataset.provenance['patients'] and list(model.provenance['patients']) == [
        'P1',
        'P2',
    ]
    settings = model.provenance['settings']
    assert settings['modalities'] == ['t1ce', 't2', 'flair'] and settings['activation'] == 'softmax'


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'patients': ('P1', 'P3')}, r'1 only there \(P2\); 1 only here \(P3\)'),
        ({'patients': ('P1',)}, r'1 only there \(P2\)'),
        ({'patchStride': 16}, 'config.PATCH_STRIDE is 24, not 16'),
        ({'background': [0.1, 0]}, r'BACKGROUND_SHARE, config.SEED\] is None, not \[0.1, 0\]'),
    ],
)
def test_train_refusesOtherData(changes, words):
    """A model that is trained on goes on with the same patients, files and settings only."""
    model, _ = trainOn(makeFile('a.h5'))
    with pytest.raises(ValueError, match=f'has been trained on other data .*{words}'):
        trainOn(makeFile('b.h5', **changes), model)


def test_train_refusesAMendedFile():
    """The same patients with a file that was corrected in between are other data."""
    model, _ = trainOn(makeFile('a.h5'))
    mended = {'P1': {'t1ce': 'image of P1', 'seg': 'mended'}, 'P2': {'t1ce': 'image of P2', 'seg': 'seg of P2'}}
    file = makeFile('b.h5')
    dataset = utils.BRATSDataset(file)
    dataset.provenance['patients'] = mended
    loader = torch.utils.data.DataLoader(dataset, 2)
    with pytest.raises(ValueError, match=r'1 other files \(P1\)'):
        engine.train(model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1), SCALER, loader)


def test_train_goesOnFromLoadedWeights():
    """Weights of one data set may be trained on another: the patients of both are remembered."""
    save(*trainOn(makeFile('a.h5')))
    model = checkpoints.loadModel(config.LAST_CHECKPOINT)
    trainOn(makeFile('b.h5', patients=('P8', 'P9')), model)
    assert provenance.trainedAmong(model, ['P1', 'P3', 'P8', 'P9']) == ['P1', 'P8', 'P9']
    config.OUTPUT_FOLDER += '/second'
    save(model, torch.optim.SGD(model.parameters(), 0.1))
    assert provenance.trainedAmong(checkpoints.loadModel(config.LAST_CHECKPOINT), ['P2', 'P8']) == ['P2', 'P8']


@pytest.mark.parametrize(
    'wrap', [lambda m: m, torch.nn.DataParallel, torch.compile], ids=['bare', 'parallel', 'compiled']
)
def test_train_notesThroughWrappers(wrap):
    """Trained through a wrapper, model and checkpoint know their patients, and the weights load into a bare model."""
    model = makeModel()
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    provenance.noteTraining(wrapped, utils.BRATSDataset(makeFile('train.h5')), 'softmax')
    assert provenance.trainedAmong(model, ['P1', 'P3']) == provenance.trainedAmong(wrapped, ['P1', 'P3']) == ['P1']
    save(wrapped, optimizer)
    loaded = checkpoints.loadModel(config.LAST_CHECKPOINT)
    assert provenance.trainedAmong(loaded, ['P1', 'P3']) == ['P1']
    assert torch.equal(next(loaded.parameters()), next(model.parameters()))


@pytest.mark.parametrize('wrap', [torch.nn.DataParallel, torch.compile])
def test_makeAverage_savesWeightsThatLoad(wrap):
    """The average of a wrapped model is saved as that of the model, knows its patients, and loads."""
    config.AVERAGE, model = 0.5, makeModel()
    wrapped = wrap(model)
    average, optimizer = engine.makeAverage(wrapped, 8), torch.optim.SGD(model.parameters(), 0.1)
    provenance.noteTraining(wrapped, utils.BRATSDataset(makeFile('train.h5')), 'softmax')
    checkpoints.makeCheckpoint(0, wrapped, optimizer, None, SCALER, 1.0, 1.0, 9.0, average)
    loaded = checkpoints.loadModel(config.BEST_CHECKPOINT)
    assert torch.equal(next(loaded.parameters()), next(model.parameters()))
    resumed = engine.makeAverage(model, 8)
    checkpoints.loadCheckpoint(model, optimizer, None, SCALER, config.LAST_CHECKPOINT, resumed)
    assert provenance.trainedAmong(resumed, ['P1', 'P3']) == ['P1']


def test_train_notesThePatientsOfASubset():
    """Of a file of three patients, only those whose patches are trained on are noted: by Subset, number, or joined."""
    dataset = utils.BRATSDataset(makeFile('a.h5', patients=('P1', 'P2', 'P3')))
    subset = torch.utils.data.Subset(dataset, [3, 1])
    assert list(provenance.ofDataset(subset)['patients']) == ['P1', 'P3']
    assert list(provenance.ofDataset(torch.utils.data.Subset(subset, [0]))['patients']) == ['P3']
    assert list(provenance.ofDataset(utils.BRATSDataset(dataset.path, 3))['patients']) == ['P1', 'P2']
    other = utils.BRATSDataset(makeFile('b.h5', patients=('P8',)))
    joined = provenance.ofDataset(torch.utils.data.ConcatDataset([subset, other]))
    assert sorted(joined['patients']) == ['P1', 'P3', 'P8']


def test_train_warnsOfUnknownPatientsAfterKnownOnes():
    """A loader that does not say whose patches it gives is no secret way to train on more patients."""
    model, optimizer = trainOn(makeFile('train.h5'))
    batches = [(torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long))]
    with pytest.warns(UserWarning, match='The patients of this loader are not known'):
        engine.train(model, torch.nn.CrossEntropyLoss(), optimizer, SCALER, batches)


def test_train_refusesTheOtherKindOfLoss():
    """A model trained with a softmax is not trained on with the focal loss, whose probabilities are sigmoids."""
    model, _ = trainOn(makeFile('a.h5'))
    with pytest.raises(ValueError, match='the loss has a softmax, not a sigmoid'):
        trainOn(makeFile('a.h5'), model, smp.losses.FocalLoss('multiclass'))


def test_train_marksNoModelThatItRefuses():
    """A call with an optimizer of another model leaves the model unmarked."""
    model, loader = makeModel(), torch.utils.data.DataLoader(utils.BRATSDataset(makeFile('a.h5')), 2)
    optimizer = torch.optim.SGD(torch.nn.Conv2d(1, 1, 1).parameters(), 0.1)
    with pytest.raises(ValueError, match='none of the parameters'):
        engine.train(model, torch.nn.CrossEntropyLoss(), optimizer, SCALER, loader)
    assert provenance.provenanceOf(model) is None


def test_validate_refusesPatchesCutOtherwise():
    """Validation patches of other channels, as many as in training, are refused."""
    model, _ = trainOn(makeFile('train.h5'))
    config.MODALITIES = ('flair', 't2', 't1ce')
    loader = torch.utils.data.DataLoader(utils.BRATSDataset(makeFile('val.h5', patients=('P9',))), 2)
    with pytest.raises(
        ValueError, match=r'The validation patches were cut otherwise than those of training: config\.MODAL'
    ):
        engine.validate(model, torch.nn.CrossEntropyLoss(), loader)


def test_validate_warnsOfTrainedPatients():
    """Validation patients that the model was trained on, as in a stale file of an earlier split, are named."""
    model, _ = trainOn(makeFile('train.h5'))
    stale, other = makeFile('val.h5', patients=('P2', 'P3')), makeFile('good.h5', patients=('P3',))
    loaders = [torch.utils.data.DataLoader(utils.BRATSDataset(file), 2) for file in (stale, other)]
    with pytest.warns(UserWarning, match='trained on 1 of 2 patients: P2'):
        engine.validate(model, torch.nn.CrossEntropyLoss(), loaders[0])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        engine.validate(model, torch.nn.CrossEntropyLoss(), loaders[1])


# Resuming


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'patients': ('P3', 'P4')}, r'2 only there \(P1, P2\)'),
        ({'patchStride': 16}, 'PATCH_STRIDE is 24, not 16'),
        ({'editions': {'BraTS2021': []}}, "the labels' classes in each edition"),
    ],
)
def test_loadCheckpoint_refusesTheNextFoldInTheSameFolder(changes, words):
    """A finished run is not resumed with another fold, seed or data set; only its weights can be loaded."""
    save(*trainOn(makeFile('train.h5')))
    makeFile('train.h5', **changes)
    model = makeModel()
    optimizer = torch.optim.Adam(model.parameters())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf'last\.pt belongs to a run on other data than .*train\.h5: .*{words}.*OUTPUT_FOLDER'
    ):
        checkpoints.loadCheckpoint(model, optimizer, None, SCALER, config.LAST_CHECKPOINT)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert checkpoints.loadCheckpoint(model, None, None, None, config.LAST_CHECKPOINT)[4] == 1


def test_loadCheckpoint_comparesTheFileThatIsTrainedOn():
    """With a file of another name nothing is known at first; the first epoch then refuses it."""
    config.TRAIN_FILE = makeFile('mine.h5')
    save(*trainOn(config.TRAIN_FILE))
    config.TRAIN_FILE = 'nowhere.h5'
    model = makeModel()
    optimizer = torch.optim.Adam(model.parameters())
    checkpoints.loadCheckpoint(model, optimizer, None, SCALER, config.LAST_CHECKPOINT)
    with pytest.raises(ValueError, match='has been trained on other data'):
        trainOn(makeFile('other.h5', patients=('P7',)), model)


def test_loadCheckpoint_refusesAnotherValidationSet():
    """With other validation patients the best epoch would be chosen by two sets: the run is not resumed."""
    model, optimizer = trainOn(makeFile('train.h5'))
    loader = torch.utils.data.DataLoader(utils.BRATSDataset(makeFile('val.h5', patients=('P5', 'P6'))), 2)
    engine.validate(model, torch.nn.CrossEntropyLoss(), loader)
    save(model, optimizer)
    checkpoints.loadCheckpoint(model, optimizer, None, SCALER, config.LAST_CHECKPOINT)
    loader.dataset.file.close()
    makeFile('val.h5', patients=('P6', 'P7'))
    with pytest.raises(ValueError, match=r'config\.VAL_FILE, .*val\.h5: 1 only there \(P5\)'):
        checkpoints.loadCheckpoint(model, optimizer, None, SCALER, config.LAST_CHECKPOINT)


def test_loadCheckpoint_resumesIfTheValidationLacksAnEditionOrAPlane():
    """A validation without one of the mixed editions, or of thick slices only, is the one that the run began with."""
    config.PLANES = ('axial', 'coronal')
    ofOne = {'BraTS2020': [[0, 0], [1, 1], [2, 2], [4, 3]]}
    model, optimizer = trainOn(makeFile('train.h5', editions={**ofOne, 'BraTS2021': []}, sliceStep=[3, 0]))
    file = makeFile('val.h5', patients=('P5',), editions=ofOne, planes=['axial'], sliceStep=None)
    loader = torch.utils.data.DataLoader(utils.BRATSDataset(file), 2)
    engine.validate(model, torch.nn.CrossEntropyLoss(), loader)
    save(model, optimizer)
    assert checkpoints.loadCheckpoint(model, optimizer, None, SCALER, config.LAST_CHECKPOINT)[4] == 1


def test_loadCheckpoint_refusesATrainedModelWithoutAFile():
    """In a new folder, a model and optimizer that were trained before are no fresh start."""
    model, optimizer = trainOn(makeFile('train.h5'))
    config.OUTPUT_FOLDER += '/new'
    with pytest.raises(ValueError, match='the model has been trained already'):
        checkpoints.loadCheckpoint(model, optimizer, None, SCALER, config.LAST_CHECKPOINT)


def test_loadCheckpoint_refusesAnotherOptimizer():
    """Adam's state is not loaded into SGD."""
    save(*trainOn(makeFile('train.h5')))
    model = makeModel()
    with pytest.raises(ValueError, match='was made with optimizer = Adam, this run has optimizer = SGD'):
        checkpoints.loadCheckpoint(
            model, torch.optim.SGD(model.parameters(), 0.1), None, SCALER, config.LAST_CHECKPOINT
        )


def test_loadCheckpoint_resumesAPartOfAFile():
    """A run that is trained on the first patches of a file resumes, though the file holds more patients."""
    file = makeFile('train.h5', patients=('P1', 'P2', 'P3'))
    model = makeModel()
    optimizer = torch.optim.Adam(model.parameters())
    loader = torch.utils.data.DataLoader(utils.BRATSDataset(file, 2), 2)
    engine.train(model, torch.nn.CrossEntropyLoss(), optimizer, SCALER, loader)
    save(model, optimizer)
    checkpoints.loadCheckpoint(model, optimizer, None, SCALER, config.LAST_CHECKPOINT)
    engine.train(model, torch.nn.CrossEntropyLoss(), optimizer, SCALER, loader)


def test_makeCheckpoint_writesOverNoOtherRun():
    """At the same epoch, the checkpoint of a model of other patients does not replace this run's."""
    save(*trainOn(makeFile('a.h5')))
    before = Path(config.LAST_CHECKPOINT).read_bytes()
    model, optimizer = trainOn(makeFile('b.h5', patients=('P8',)))
    with pytest.raises(ValueError, match='belongs to a run on other data than the model'):
        save(model, optimizer, epoch=1)
    assert Path(config.LAST_CHECKPOINT).read_bytes() == before


# Prediction


def test_loadModel_comparesConfigWithoutAnIdentity():
    """Weights that do not know what they were trained on follow config, so their modalities have to be its."""
    model = makeModel()
    save(model, torch.optim.SGD(model.parameters(), 0.1))
    checkpoints.loadModel(config.LAST_CHECKPOINT)
    config.MODALITIES = ('flair', 't2', 't1ce')
    with pytest.raises(ValueError, match='was made with MODALITIES ='):
        checkpoints.loadModel(config.LAST_CHECKPOINT)


def test_loadModel_needsNoConfiguration(df, tmp_path):
    """Loaded under another configuration, the model predicts what it predicted under its own, and says what differs."""
    config.MODALITIES, config.STRETCH_RANGE, config.STRETCH_PERCENTILES = ('flair', 't1'), (0, 1), (5, 95)
    preprocess.makeDataset(df[:1], config.TRAIN_FILE)
    model, optimizer = trainOn(config.TRAIN_FILE, criterion=smp.losses.FocalLoss('multiclass'))
    save(model, optimizer)
    expected = engine.predict(df.iloc[2], model, patchStride=24, probabilities=True)
    config.MODALITIES, config.STRETCH_RANGE, config.STRETCH_PERCENTILES = ('t1ce', 't2', 'flair'), (-1, 1), (0.5, 99.5)
    config.PATCH_SIZE, config.ENCODER_NAME, config.ENCODER_DEPTH = 64, 'resnet50', 5
    loaded = checkpoints.loadModel(config.LAST_CHECKPOINT)
    words = (
        r"MODALITIES is \['t1ce', 't2', 'flair'\], not \['flair', 't1'\]; config.PATCH_SIZE is 64, not 32; .*STRETCH"
    )
    with pytest.warns(UserWarning, match=f'The settings of the training are used where config differs: config.{words}'):
        found = engine.predict(df.iloc[2], loaded, patchStride=24, probabilities=True)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    with pytest.warns(UserWarning, match='are used where config'):
        [(_, again)] = engine.predictAll(df[2:], loaded, patchStride=24)
    assert torch.equal(again[2], expected[2])


def test_loadModel_refusesWhatItCannotBuild(tmp_path):
    """A missing file, a model of one's own, and one with other options are refused in words."""
    with pytest.raises(FileNotFoundError, match=r'none\.pt does not exist'):
        checkpoints.loadModel(tmp_path / 'none.pt')
    model = torch.nn.Conv2d(3, 4, 1)
    save(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match='has a Conv2d: make the model yourself and use loadCheckpoint'):
        checkpoints.loadModel(config.LAST_CHECKPOINT)
    config.OUTPUT_FOLDER += '/other'
    model = makeModel()
    save(model, torch.optim.SGD(model.parameters(), 0.1))
    config.OUTPUT_FOLDER += '/wider'
    config.DECODER_CHANNELS = (32, 8, 8)
    save(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match='belongs to another model'):
        checkpoints.loadModel(config.LAST_CHECKPOINT)


def test_predict_refusesAnotherStretching(df):
    """A transform that stretches otherwise than in training is refused, also inside a Compose; the same one is not."""
    model, _ = trainOn(makeFile('train.h5'))
    same, other = transforms.makeTransforms()[2], transforms.volumeTransform(outRange=(0, 1))
    engine.predict(df.iloc[0], model, transform=same)
    for transform in (other, tio.Compose([other, tio.Lambda(torch.clone)])):
        with pytest.raises(
            ValueError, match=r'stretches the percentiles .* to \[0\.0, 1\.0\], but the model was trained on'
        ):
            engine.predict(df.iloc[0], model, transform=transform)


def test_predict_asksForTheTransformOfTheTraining(df):
    """Weights of patches that a transform of one's own made need that transform at prediction."""
    model, _ = trainOn(makeFile('train.h5', stretching=None))
    with pytest.raises(ValueError, match='a transform of your own made: give predict the same one'):
        engine.predict(df.iloc[0], model)
    engine.predict(df.iloc[0], model, transform=lambda subject: subject)


def test_predict_refusesAModelOfOtherClasses(df):
    """A model trained with other names of the classes, or in another order, is refused."""
    model, _ = trainOn(makeFile('train.h5'))
    config.CLASS_NAMES = ('background', 'edema', 'necrotic core', 'enhancing tumor')
    with pytest.raises(ValueError, match=r"The model predicts .*'necrotic core', 'edema'.*CLASS_NAMES is"):
        engine.predict(df.iloc[0], model)


def test_predict_followsTheLoss(df):
    """Trained with the focal loss, probabilities are sigmoids divided by their sum; otherwise a softmax."""

    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor([0.0, 1.0, 2.0, -1.0]))

        def forward(self, x):
            return self.logits[None, :, None, None].expand(len(x), 4, *x.shape[2:]) + 0 * x[:, :1]

    odds = 1 / (1 + np.exp(-np.array([0.0, 1, 2, -1])))
    for criterion, expected in (
        (smp.losses.FocalLoss('multiclass'), odds / odds.sum()),
        (torch.nn.CrossEntropyLoss(), np.exp([0.0, 1, 2, -1]) / np.exp([0.0, 1, 2, -1]).sum()),
    ):
        config.LEARN_RATE = 0.0
        model, _ = trainOn(makeFile('train.h5'), Constant(), criterion)
        *_, probability = engine.predict(df.iloc[0], model, probabilities=True)
        np.testing.assert_allclose(probability[8, :, 20, 20], expected, atol=1e-3)
        np.testing.assert_allclose(probability.sum(1), 1, atol=1e-5)


def makeTrained(df):
    """Return a model that was trained on the first patient."""
    preprocess.makeDataset(df[:1], config.TRAIN_FILE)
    return trainOn(config.TRAIN_FILE)[0]


def test_predictAll_namesTrainedPatientsOnce(df):
    """Of three patients the one that the model was trained on is named, once, before the first is predicted."""
    model = makeTrained(df)
    with pytest.warns(UserWarning, match='was trained on 1 of 3 patients: BraTS20_Training_001') as found:
        assert len(list(engine.predictAll(df, model))) == 3
    assert len(found) == 1


def test_trainedAmong_knowsOtherTimePoints():
    """Another scan of a subject that the model was trained on is no test either."""
    model, _ = trainOn(makeFile('train.h5', patients=('BraTS-GLI-00001-000', 'BraTS20_Training_001')))
    ids = ['BraTS-GLI-00001-001', 'BraTS-GLI-00002-000', 'BraTS20_Training_001', 'BraTS20_Training_002']
    assert provenance.trainedAmong(model, ids) == [ids[0], ids[2]]


def test_predictAll_recognizesARenamedPatient(df):
    """The same files under another id are a patient that the model was trained on."""
    model = makeTrained(df)
    renamed = df[:1].rename({df.index[0]: 'BraTS20_Training_777'})
    with pytest.warns(UserWarning, match='was trained on 1 of 1 patients: BraTS20_Training_777'):
        list(engine.predictAll(renamed, model))


def test_predictAll_knowsOtherPatientsOfTheSameName(df, tmp_path):
    """Two hospitals may both have a patient 001: with other images it is a test, and a warning says so."""
    model = makeTrained(df)
    phantom.makeCases(tmp_path / 'elsewhere', 1, seed=7, shape=(40, 40, 16))
    elsewhere = utils.makeFileList(tmp_path / 'elsewhere')
    assert provenance.trainedPatients(model, df) == [df.index[0]]
    with pytest.warns(UserWarning, match=f'{df.index[0]} has the name of a patient that the model was trained on, but'):
        assert provenance.trainedPatients(model, elsewhere) == []


def test_trainedPatients_takesNoPatientForAnotherByAnEmptyImage(df):
    """Where T2 is missing, files of zeros may stand in its place: they are equal in all patients."""
    affine = nib.load(df['t1ce'].iloc[0]).affine
    for file in df['t2']:
        saveVolume(np.zeros((40, 40, 16), np.int16), Path(file), affine)
    assert provenance.checksums(df.iloc[0])['t2'] == provenance.checksums(df.iloc[1])['t2']
    model = makeTrained(df)
    assert provenance.trainedPatients(model, df) == [df.index[0]]
    assert provenance.trainedPatients(model, df.rename({df.index[0]: 'BraTS20_Training_777'})) == [
        'BraTS20_Training_777'
    ]


def test_checksums_tellFilesOfBgzipApart(df):
    """Their last part is empty, and has the same checksum in all."""
    for file in df['t2']:
        Path(file).write_bytes(Path(file).read_bytes() + gzip.compress(b''))
    assert provenance.checksums(df.iloc[0])['t2'] != provenance.checksums(df.iloc[1])['t2']


def test_trainedPatients_knowsAnUnpackedCopy(df, tmp_path):
    """The same images as `.nii` are those of the training, as they are when packed."""
    model, copy = makeTrained(df), df[:1].copy()
    for column in copy:
        file = tmp_path / 'copy' / f'{df.index[0]}_{column}.nii'
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(gzip.decompress(Path(df[column].iloc[0]).read_bytes()))
        copy.loc[df.index[0], column] = str(file)
    assert provenance.trainedPatients(model, copy) == [df.index[0]]
    assert provenance.checksums(copy.iloc[0]) == provenance.checksums(df.iloc[0])


@pytest.mark.filterwarnings('ignore:The model was trained on')
def test_predictFolder_keepsWhatAnEarlierCallWrote(df, tmp_path):
    """Two calls for two parts of the patients leave the scores of both, and remember who was trained on."""
    model, folder = makeTrained(df), tmp_path / 'out'
    postprocess.predictFolder(df[:2], model, folder)
    assert list(postprocess.predictFolder(df[2:], model, folder)['patient'].unique()) == [df.index[2]]
    assert sorted(pd.read_csv(folder / 'scores.csv')['patient'].unique()) == list(df.index[1:])
    assert set(postprocess.scoreFolder(df, folder / 'upload')['patient']) == set(df.index[1:])


def test_predictFolder_leavesTheScoresOfANotebook(df, tmp_path):
    """A folder that writeScores filled keeps its scores: predictFolder asks for another one."""
    model = makeModel()
    _, y, yhat = engine.predict(df.iloc[0], model)
    postprocess.writeScores({df.index[0]: metrics.scorePatient(y, yhat)}, tmp_path / 'out', model, df)
    before = (tmp_path / 'out' / 'scores.csv').read_bytes()
    with pytest.raises(ValueError, match='out holds segmentations with other weights'):
        postprocess.predictFolder(df[1:], model, tmp_path / 'out')
    assert (tmp_path / 'out' / 'scores.csv').read_bytes() == before


@pytest.mark.filterwarnings('ignore:The model was trained on')
def test_predictFolder_scoresNoTrainedPatient(df, tmp_path, capsys):
    """Trained patients are segmented, but in no table: of predictFolder, of scoreFolder, of writeScores."""
    model, folder = makeTrained(df), tmp_path / 'out'
    table = postprocess.predictFolder(df, model, folder)
    assert sorted(set(table['patient'])) == list(df.index[1:]) and len(list((folder / 'upload').iterdir())) == 3
    pd.testing.assert_frame_equal(postprocess.scoreFolder(df, folder / 'upload'), table)
    scores = {patient: group.drop(columns='patient').set_index('region') for patient, group in table.groupby('patient')}
    scores[df.index[0]] = scores[df.index[1]]
    assert set(postprocess.writeScores(scores, tmp_path / 'again', model=model)['patient']) == set(df.index[1:])
    assert capsys.readouterr().out.count(f'Not scored, because the model was trained on them: {df.index[0]}') == 2


def test_predictFolder_mixesNoModels(df, tmp_path):
    """Other weights, a stride or rules do not write into a folder of earlier segmentations; the same model does."""
    torch.manual_seed(1)
    one, other, folder = makeModel(), engine.makeModel(), tmp_path / 'out'
    for _ in range(2):
        postprocess.predictFolder(df[:1], one, folder)
    for model, options, words in (
        (other, {}, 'weights'),
        (one, {'patchStride': 24}, 'kind'),
        (one, {'rules': postprocess.Tuning(N=5)}, 'rules'),
        (one, {'transform': transforms.volumeTransform(outRange=(0, 1))}, 'input'),
    ):
        with pytest.raises(ValueError, match=f'out holds segmentations with other {words}'):
            postprocess.predictFolder(df, model, folder, **options)


def test_rules_fitTheKindOfPredictionTheyWereTunedOn(df, tmp_path):
    """Rules tuned on whole boxes are refused for windows, by predictFolder and scoreFolder; none is applied twice."""
    model = makeModel()
    pairs = ((y, yhat) for _, (_, y, yhat) in engine.predictAll(df[:2], model))
    rules = postprocess.tunePostprocessing(pairs)
    with pytest.raises(
        ValueError, match=r"tuned on predictions with {'patchStride': None, .* these have {'patchStride': 24"
    ):
        postprocess.predictFolder(df[2:], model, tmp_path / 'windows', rules=rules, patchStride=24)
    postprocess.predictFolder(df[2:], model, tmp_path / 'plain', patchStride=24)
    with pytest.raises(ValueError, match='tuned on predictions with'):
        postprocess.scoreFolder(df[2:], tmp_path / 'plain' / 'upload', rules=rules)
    fitting = postprocess.tunePostprocessing({'a': (np.zeros((2, 2, 2), int),) * 2}, patchStride=24)._replace(N=10**6)
    expected = postprocess.predictFolder(df[2:], model, tmp_path / 'done', rules=fitting, patchStride=24)
    found = postprocess.scoreFolder(df[2:], tmp_path / 'plain' / 'upload', rules=fitting)
    pd.testing.assert_frame_equal(found, expected)
    with pytest.raises(ValueError, match='have rules applied already'):
        postprocess.scoreFolder(df[2:], tmp_path / 'done' / 'upload', rules=fitting)


def test_predictAll_leavesOutOnRequest(df, capsys):
    """A patient that cannot be read ends the prediction, saying what was done before, or is left out and named."""
    bad = df.copy()
    bad.loc[df.index[1], 't2'] = '/gone.nii.gz'
    model, done = makeModel(), []
    with pytest.raises(
        FileNotFoundError, match=r"_002: .* 1 of 3 patients were segmented before.*'leaveOut' would go on"
    ):
        done.extend(patient for patient, _ in engine.predictAll(bad, model))
    config.ON_BAD_PATIENT = 'leaveOut'
    assert [patient for patient, _ in engine.predictAll(bad, model)] == [df.index[0], df.index[2]]
    assert 'Left out: BraTS20_Training_002' in capsys.readouterr().out


def test_predict_leavesFrozenLayersFrozen(df):
    """A batch normalization that was set to evaluation stays so after a prediction, in a model that trains."""
    model = makeModel().train()
    frozen = next(layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)).eval()
    engine.predict(df.iloc[0], model)
    assert model.training and not frozen.training


# Ensembles


def makeMember(df, seed):
    """Return a model of random weights that was trained on the patients of a file list."""
    preprocess.makeDataset(df, f'{config.OUTPUT_FOLDER}/member.h5')
    model, _ = trainOn(f'{config.OUTPUT_FOLDER}/member.h5')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.3)
    return model


def test_predictAll_predictsByTheMembersThatHaveNotSeenAPatient(df, capsys):
    """Of three members, each patient of the training is left to the other two, by the mean of their probabilities."""
    members = [makeMember(df[number : number + 1], number) for number in range(3)]
    found = dict(engine.predictAll(df, members, probabilities=True))
    for number, patient in enumerate(df.index):
        others = [member for other, member in enumerate(members) if other != number]
        alone = [engine.predict(df.loc[patient], member, probabilities=True)[3] for member in others]
        assert not torch.equal(*alone)
        torch.testing.assert_close(found[patient][3], sum(alone) / 2)
    assert '3 of 3 patients are predicted only by the models that were not trained on them' in capsys.readouterr().out


def test_predictFolder_scoresTheMembersOfACrossValidation(df, tmp_path):
    """Two folds together score every patient; a patient that all members have seen is segmented, but not scored."""
    members = [makeMember(df[1:], 0), makeMember(df[:2], 1)]
    with pytest.warns(UserWarning, match=f'was trained on 1 of 3 patients: {df.index[1]}'):
        table = postprocess.predictFolder(df, members, tmp_path / 'out')
    assert sorted(set(table['patient'])) == [df.index[0], df.index[2]]
    assert len(list((tmp_path / 'out' / 'upload').iterdir())) == 3
    single = metrics.scorePatient(*engine.predict(df.iloc[0], members[0])[1:])
    found = table[table['patient'] == df.index[0]].set_index('region')['volumePredicted']
    assert found.to_dict() == pytest.approx(single['volumePredicted'].to_dict())


def test_predict_refusesMembersThatSeeOtherInputs(df):
    """Members whose modalities differ are refused; an empty list too."""
    first = makeTrained(df)
    second = makeTrained(df)
    settings = {**second.provenance['settings'], 'modalities': ['t2', 't1ce', 'flair']}
    second.provenance = {**second.provenance, 'settings': settings}
    with (
        pytest.warns(UserWarning, match='The settings of the training are used where config differs'),
        pytest.raises(ValueError, match=r"Model 2 of the ensemble was trained on \['t2', 't1ce', 'flair'\]"),
    ):
        engine.predict(df.iloc[0], [first, second])
    with pytest.raises(ValueError, match='The list of models is empty'):
        engine.predict(df.iloc[0], [])
