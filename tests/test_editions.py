"""Each edition is detected from its names, and its labels become the classes that config asks for."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import config
import patients
import postprocess
from conftest import NEWER, UPENN, drawCases, namesNewer, save, touch, writeLayout
from patients import cohort, editions


@pytest.fixture
def clinic():
    """A data set with names, labels and modalities of its own, as masks of tumor or not."""
    edition = editions.Edition(
        patient=r'case\d+',
        suffixes={'Contrast': ('t1ce',), 'fl.air': ('flair',), 'mask': ('seg',)},
        classes={0: 0, 255: 1},
    )
    config.OWN_EDITIONS, config.MODALITIES = {'Clinic': edition}, ('t1ce', 'flair')
    return edition


def writeGLI(folder, time, label):
    """Write a patient of GLI with the given label at a time point, and return its row of the file list."""
    patient = f'BraTS-GLI-00007-{time}'
    image = np.arange(label.size, dtype=np.int16).reshape(label.shape)
    for column in NEWER:
        save(label if column == 'seg' else image, folder / patient / f'{patient}-{column}.nii.gz')
    return patients.makeFileList(folder).loc[patient]


def labelOf(*values):
    """Return a label (4, 4, 4) that begins with the given values."""
    label = np.zeros(64, np.uint8)
    label[: len(values)] = values
    return label.reshape(4, 4, 4)


@pytest.mark.parametrize(
    ('declared', 'time', 'expected'),
    [
        *((None, time, 'BraTS2023') for time in ('000', '001', '099')),
        *((None, time, 'BraTS2024') for time in ('100', '999')),
        *((name, time, name) for name in ('BraTS2023', 'BraTS2024') for time in ('000', '101')),
    ],
)
def test_detect_followsTheTimePointOrWhatIsDeclared(declared, time, expected):
    """GLI below 100 has the labels of 2023, from 100 on of 2024; a declared edition claims all of GLI, nothing else."""
    config.EDITION = declared
    assert editions.detect(f'BraTS-GLI-00001-{time}-t1c.nii.gz').edition == expected
    assert editions.detect('BraTS2021_00001_t1ce.nii.gz').edition == 'BraTS2021'


def test_readCase_refusesACavityBeforeTreatment(tmp_path):
    """A 4 below time point 100 is an error with a hint; from 100 on, or if declared, background, or class 4 of five."""
    label = labelOf(1, 2, 3, 4)
    before = writeGLI(tmp_path, '001', label)
    words = r"BraTS-GLI-00007-001: .*labels \[0, 1, 2, 3, 4\].*below 100.*before treatment.*EDITION = 'BraTS2024'"
    with pytest.raises(ValueError, match=words):
        patients.readCase(before)
    after = writeGLI(tmp_path, '100', label)
    np.testing.assert_array_equal(patients.readCase(after)[1], labelOf(1, 2, 3, 0))
    config.EDITION = 'BraTS2024'
    np.testing.assert_array_equal(patients.readCase(before)[1], labelOf(1, 2, 3, 0))
    config.NO_CLASSES = 5
    np.testing.assert_array_equal(patients.readCase(after)[1], label)


@pytest.mark.parametrize(
    ('edition', 'numClasses', 'classes', 'labels'),
    [
        ('BraTS2020', 4, {0: 0, 1: 1, 2: 2, 4: 3}, {0: 0, 1: 1, 2: 2, 3: 4}),
        ('BraTS2020', 5, {0: 0, 1: 1, 2: 2, 4: 3}, {0: 0, 1: 1, 2: 2, 3: 4, 4: 0}),  # never class 4
        ('BraTS2020', 2, {0: 0, 1: 1, 2: 1, 4: 1}, {0: 0, 1: 1}),
        ('BraTS2024', 4, {0: 0, 1: 1, 2: 2, 3: 3, 4: 0}, {0: 0, 1: 1, 2: 2, 3: 3}),
        ('BraTS2024', 5, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}),
        ('BraTS2024', 2, {0: 0, 1: 1, 2: 1, 3: 1, 4: 0}, {0: 0, 1: 1}),
        ('Decathlon', 5, {0: 0, 1: 2, 2: 1, 3: 3}, {0: 0, 1: 2, 2: 1, 3: 3, 4: 0}),
    ],
)
def test_classesOf_followsTheNumberOfClasses(edition, numClasses, classes, labels):
    """With two classes all tumor is 1, and the cavity is not tumor; labelsOf inverts the table, with a cavity as 0."""
    config.NO_CLASSES = numClasses
    assert editions.classesOf(edition) == classes and editions.labelsOf(edition) == labels


def test_saveSegmentation_writesTheCavity(tmp_path):
    """Class 4 is written as label 4 after treatment and read back; before it, as background, with a warning."""
    config.NO_CLASSES = 5
    classes = labelOf(1, 2, 3, 4).transpose(2, 0, 1)  # (W, H, D) -> (D, W, H)
    after = writeGLI(tmp_path, '101', labelOf(1, 2, 3, 4))
    patients.saveSegmentation(classes, after, tmp_path / 'out' / f'{after.name}.nii.gz')
    y, yhat = postprocess.readPrediction(after, tmp_path / 'out')
    np.testing.assert_array_equal(yhat, classes)
    np.testing.assert_array_equal(y, classes)
    before = writeGLI(tmp_path, '000', labelOf(1, 2, 3))
    with pytest.warns(UserWarning, match='1 voxels of resection cavity .* as background; BraTS2023 has no label'):
        patients.saveSegmentation(classes, before, tmp_path / 'out.nii.gz')
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / 'out.nii.gz').dataobj), labelOf(1, 2, 3))
    config.NO_CLASSES = 4
    with pytest.raises(ValueError, match=r'\[0 1 2 3 4\]; 0, 1, 2, 3 were expected, which have a label in BraTS2024'):
        patients.saveSegmentation(classes, after, tmp_path / 'out.nii.gz')


def test_makeFileList_prefersUpennsSegmentationsByHand(tmp_path, capsys):
    """By hand wins over automatic, whichever is found first; automatic ones are counted, and are findings."""
    for number in (1, 2, 3):
        stem = f'UPENN-GBM-{number:05d}_11'
        image, classes = drawCases(1, number)[0]
        for end, volume in zip(UPENN, image, strict=True):
            save(volume, tmp_path / f'images_structural/{stem}/{stem}_{end}.nii.gz')
        save(np.full(classes.shape, 2, np.uint8), tmp_path / f'automated_segm/{stem}_automated_approx_segm.nii.gz')
    for folder, number in (('images_segm', 1), ('a', 2)):
        save(np.full(classes.shape, 1, np.uint8), tmp_path / f'{folder}/UPENN-GBM-{number:05d}_11_segm.nii.gz')
    df = patients.makeFileList(tmp_path)
    assert [patients.readLabel(paths).max() for _, paths in df.iterrows()] == [1, 1, 2]
    assert '1 segmentations are automatic, without correction by hand; for 2 patients one' in capsys.readouterr().out
    touch(tmp_path, 'automated_segm/UPENN-GBM-00004_11_automated_approx_segm.nii.gz')
    assert len(patients.makeFileList(tmp_path)) == 3
    assert 'UPENN-GBM-00004_11 has no image' in capsys.readouterr().out
    found = cohort.checkFiles(df)
    isAutomatic = found['finding'] == 'segmented automatically, and not corrected by hand'
    assert found.loc[isAutomatic, ['patient', 'stops']].to_numpy().tolist() == [['UPENN-GBM-00003_11', False]]


def test_makeFileList_ignoresOtherSeriesOfUCSF(tmp_path):
    """Bias-corrected images, diffusion and brain masks are no modalities; follow-ups are patients of their own."""
    for stem in ('UCSF-PDGM-0431', 'UCSF-PDGM-0431_FU001d'):
        ends = 'T1 T1_bias T1c T1c_bias T2 FLAIR SWI ADC brain_segmentation tumor_segmentation'
        touch(tmp_path, *(f'{stem}_nifti/{stem}_{end}.nii.gz' for end in ends.split()))
    df = patients.makeFileList(tmp_path)
    assert list(df.index) == ['UCSF-PDGM-0431', 'UCSF-PDGM-0431_FU001d'] and df.notna().all(axis=None)
    assert df.loc['UCSF-PDGM-0431', 't1ce'].endswith('0431_T1c.nii.gz')


@pytest.mark.parametrize(
    ('subject', 'time', 'ending'),
    [
        ('BraTS-GLI-00001', '-101', '-t2f'),
        ('brats-gli-00001', '-000', '-t2f'),
        ('BraTS-SSA-00001', '-000', '-t2f'),
        ('BraTS-GoAT-00001', '', '-t2f'),
        ('UCSF-PDGM-0431', '_FU001d', '_FLAIR'),
        ('ucsf-pdgm-0431', '_fu001d', '_flair'),
        ('UPENN-GBM-00001', '_21', '_FLAIR'),
    ],
)
def test_withoutTime_returnsTheSubject(subject, time, ending):
    """Time points of GLI and SSA, follow-ups of UCSF and UPENN are left out of an id, in any case."""
    assert editions.detect(f'{subject}{time}{ending}.nii.gz').patient == subject + time
    assert editions.withoutTime(subject + time) == subject


def test_detectPatient_takesTheIdAlone():
    """An id says its edition; `config.EDITION` claims some and decides for unknown ones, which are refused without."""
    ids = ['UCSF-PDGM-0431_FU001d', 'UPENN-GBM-00001_11', 'BRATS_001', 'BraTS-GLI-00001-100', 'BraTS20_Training_001']
    names = ['UCSF-PDGM', 'UPENN-GBM', 'Decathlon', 'BraTS2024', 'BraTS2020']
    assert [editions.detectPatient(patient) for patient in ids] == names
    with pytest.raises(ValueError, match=r'anyone: the edition cannot be detected'):
        editions.detectPatient('anyone')
    config.EDITION = 'BraTS2023'
    assert [editions.detectPatient(patient) for patient in (*ids[2:4], 'anyone')] == ['Decathlon'] + 2 * ['BraTS2023']


def test_labelsFrom_writesBackgroundAs0():
    """Whatever other labels mean background too, and in whatever order they were given."""
    assert editions.labelsFrom({9: 0, 4: 3, 2: 2, 1: 1, 0: 0}, 4) == {0: 0, 1: 1, 2: 2, 3: 4}


def test_countWithCavity_addsItToFourClassesOnly():
    """Four classes become five, the cavity among them; other numbers stay."""
    for config.NO_CLASSES, expected in ((2, 2), (3, 3), (4, 5), (5, 5), (6, 6)):
        assert editions.countWithCavity() == expected


@pytest.mark.parametrize('declared', [None, 'BraTS2023'])
@pytest.mark.parametrize(
    ('file', 'words'),
    [
        ('BraTS-PED-00001-000-t1c', 'BraTS-PED, tumors of children, where label 1 is the enhancing tumor'),
        ('BraTS-MEN-00001-000-t1c', 'BraTS-MEN, meningiomas: another disease'),
        ('BraTS-MEN-RT-0001-1_t1c', 'BraTS-MEN-RT, meningiomas before radiotherapy'),
        ('BraTS-MET-00001-000-t1c', 'BraTS-MET, metastases: another disease'),
        ('PatientID_0003_Timepoint_1_brain_t1c', 'MU-Glioma-Post, of which public descriptions disagree'),
    ],
)
def test_makeFileList_refusesOtherDiseasesByName(tmp_path, file, words, declared):
    """Other data sets are refused with the reason, beside patients that could be read and under a declared edition."""
    config.EDITION = declared
    touch(tmp_path, *namesNewer('BraTS-GLI-00001-000'), f'other/{file}.nii.gz')
    with pytest.raises(ValueError, match=rf'{file}\.nii\.gz cannot be read: it .*{words}'):
        patients.makeFileList(tmp_path)
    with pytest.raises(ValueError, match=rf'{file}\.nii\.gz cannot be read: it .*{words}'):  # named by the user
        patients.readCase({'t1ce': str(tmp_path / f'other/{file}.nii.gz')}, ('t1ce',))


def test_checkFiles_takesASegmentationOfAnyName(tmp_path):
    """A segmentation whose name says nothing belongs to the edition of its images."""
    paths = writeGLI(tmp_path, '000', labelOf(1, 2, 3))
    save(labelOf(1, 2, 3), tmp_path / 'mine.nii.gz')
    df = pd.DataFrame([{**paths, 'seg': str(tmp_path / 'mine.nii.gz')}], [paths.name])
    assert not cohort.checkFiles(df)['stops'].any()


@pytest.mark.parametrize(
    ('file', 'words'),
    [
        ('data/volume_41_slice_12.h5', r'slices of BraTS 2020.*Attach .*awsaf49/brats20-dataset-training-validation'),
        ('HGG/brats_1/VSD.Brain.XX.O.MR_Flair.1/VSD.Brain.XX.O.MR_Flair.1.mha', 'BraTS 2013 to 2016.*not read'),
    ],
)
def test_makeFileList_saysWhichDataSetToTakeInstead(tmp_path, monkeypatch, file, words):
    """Slices of 2020 in .h5, also found on Kaggle, and the .mha of the first years are refused with what to take."""
    monkeypatch.setattr(config, 'Path', lambda path: tmp_path)
    assert config._findOnKaggle.__wrapped__() is None
    touch(tmp_path, file)
    assert config._findOnKaggle.__wrapped__() == (str(tmp_path) if file.endswith('.h5') else None)
    with pytest.raises(FileNotFoundError, match=words):
        patients.makeFileList(tmp_path)


def test_ownEdition_isReadAsDescribed(tmp_path, clinic):
    """Own names in any case, own labels and two modalities are read as two classes and written in the own labels."""
    config.NO_CLASSES = 2
    mask, image = labelOf(255, 255), np.arange(64, dtype=np.int16).reshape(4, 4, 4)
    for end, volume in {'contrast': image, 'FL.AIR': image + 1, 'mask': mask}.items():
        save(volume, tmp_path / f'case7_{end}.nii.gz')
    touch(tmp_path, 'case7_flxair.nii.gz')  # a dot in a suffix is a dot
    writeLayout('BraTS2021', tmp_path, drawCases(1, 0))
    df = patients.makeFileList(tmp_path)
    assert list(df.index) == ['BraTS2021_00001', 'case7'] and patients.detectEdition(df.loc['case7']) == 'Clinic'
    read, label = patients.readCase(df.loc['case7'])
    np.testing.assert_array_equal(read, [image, image + 1])
    np.testing.assert_array_equal(label, labelOf(1, 1))
    patients.saveSegmentation(label.transpose(2, 0, 1), df.loc['case7'], tmp_path / 'out.nii.gz')
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / 'out.nii.gz').dataobj), mask)
    assert patients.readCase(df.loc['BraTS2021_00001'])[1].max() == 1
    assert list(cohort.describeCohort(df).columns) == ['edition', 'grade', 'subject', 'tumor']


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'suffixes': {'adc': ('adc',)}}, r"columns \['adc'\]; some of t1, t1ce, t2, flair, seg"),
        ({'classes': {1: 1}}, r'labels 0 to 255 and 0: 0 were expected'),
        ({'classes': {0: 0, 256: 1}}, r'labels 0 to 255'),
    ],
)
def test_Edition_refusesWhatCannotBeRead(change, words):
    """A column that does not exist, no background, and a label beyond 255 are refused when the edition is described."""
    with pytest.raises(ValueError, match=words):
        editions.Edition(**{'patient': 'a', 'suffixes': {'t1': ('t1',)}, 'classes': {0: 0, 1: 1}} | change)


def test_classesOf_refusesOtherClassesThanThoseOfConfig(clinic):
    """A class beyond config.NO_CLASSES is refused, and masks of tumor or not while class 1 is the necrotic core."""
    with pytest.raises(ValueError, match=r'Clinic has masks of tumor or not.*set it to 2; .*necrotic core'):
        editions.classesOf('Clinic')
    config.NO_CLASSES, config.CLASS_NAMES = 3, ('background', 'core', 'edema')
    with pytest.raises(ValueError, match=r'BraTS2020 has the class 3; 0 to 2 were expected'):
        editions.classesOf('BraTS2020')


def test_config_classesFollowTheirNumber():
    """Names, colors and regions follow NO_CLASSES; another number has to bring its own."""
    for number, regions in ((2, 'WT'), (4, 'WT TC ET NCR ED'), (5, 'WT TC ET NCR ED RC')):
        config.NO_CLASSES = number
        assert len(config.CLASS_NAMES) == len(config.CLASS_COLORS) == number and ' '.join(config.REGIONS) == regions
    assert config.CLASS_NAMES[4] == 'resection cavity' and config.REGIONS['RC'] == (4,)
    config.NO_CLASSES = 3
    for name in ('CLASS_NAMES', 'REGIONS'):
        with pytest.raises(ValueError, match=r'NO_CLASSES is 3; .* set config\.CLASS_NAMES, CLASS_COLORS and REGIONS'):
            getattr(config, name)
