import itertools
import json

import numpy as np
import pandas as pd
import pytest

import config
import patients
from conftest import COLUMNS, drawCases, listOf, names, namesNewer, save, touch, writeLayout
from damage import BAD, SUSPICIOUS, changeVoxel, remove
from patients import cohort

SHAPE = (12, 13, 14)


def listEmptyFiles(folder, *ids):
    """Create empty files of patients and return their file list."""
    for patient in ids:
        touch(folder, *(namesNewer(patient) if '-GLI-' in patient or '-SSA-' in patient else names(patient)))
    return patients.makeFileList(folder)


@pytest.fixture
def writeCohort(tmp_path):
    """Return a function that writes two patients, damages the second one, and returns the file list."""

    def write(damage=lambda home, stem: None):
        for number in (1, 2):
            generator, name = np.random.default_rng(number), f'BraTS20_Training_{number:03d}'
            for column in COLUMNS:
                volume = np.zeros(SHAPE, np.int16)
                volume[2:10, 2:10, 2:10] = generator.integers(20, 900, (8, 8, 8))
                if column == 'seg':
                    volume = (volume > 700).astype(np.uint8) * 4
                save(volume, tmp_path / name / f'{name}_{column}.nii.gz')
        damage(tmp_path / name, name)
        return patients.makeFileList(tmp_path)

    return write


@pytest.mark.parametrize('kind', [*BAD, *SUSPICIOUS])
def test_checkFiles_findsEachKindOfBadInput(writeCohort, kind):
    """Findings are the damaged patient's, one names file and fault; readCase refuses in the same words, or reads."""
    column, words, damage = (BAD | SUSPICIOUS)[kind]
    df = writeCohort(damage)
    table, paths = cohort.checkFiles(df), df.iloc[1]
    assert set(table['patient']) == {paths.name}
    file = column if kind == 'missing modality' else f'{paths.name}_{column}.nii.gz'
    found = table[(table['file'] == file) & table['finding'].str.contains(words)]
    assert set(found['stops']) == {kind in BAD} and table['stops'].any() == (kind in BAD), table.values.tolist()
    if kind in SUSPICIOUS:
        patients.readCase(paths)
        return
    words = 'no file for the modality t2' if kind == 'missing modality' else f'{file} .*{words}'
    with pytest.raises((ValueError, FileNotFoundError), match=f'^{paths.name}: .*{words}'):
        patients.readCase(paths)


def test_checkFiles_isEmptyIfAllIsWell(writeCohort):
    """Good patients have no row but the columns; nor has one without a segmentation, or with one voxel of 32767."""
    table = cohort.checkFiles(writeCohort())
    assert len(table) == 0 and list(table.columns) == ['patient', 'file', 'finding', 'stops']
    assert len(cohort.checkFiles(writeCohort(remove('seg')))) == 0
    assert len(cohort.checkFiles(writeCohort(changeVoxel('t2', 32767)))) == 0


def test_checkFiles_countsTheCavityAndFindsOtherNeoplasms(tmp_path):
    """The voxels of label 4 of 2024 are counted; a patient below 51_OtherNeoplasms is no glioma."""
    gli, ssa = 'BraTS-GLI-00001-100', 'BraTS-SSA-00001-000'
    for home, name in ((tmp_path / gli, gli), (tmp_path / '51_OtherNeoplasms' / ssa, ssa)):
        for seed, end in enumerate(('t1c', 't2w', 't2f')):
            save(np.random.default_rng(seed).normal(size=SHAPE), home / f'{name}-{end}.nii.gz')
    label = np.zeros(SHAPE, np.uint8)
    label[0, 0, :5], label[1, 1, :7] = 4, 3
    save(label, tmp_path / gli / f'{gli}-seg.nii.gz')
    assert cohort.checkFiles(patients.makeFileList(tmp_path)).values.tolist() == [
        [gli, f'{gli}-seg.nii.gz', '5 voxels of resection cavity (label 4) count as background', False],
        [ssa, f'{ssa}-t1c.nii.gz', 'published under 51_OtherNeoplasms: not a glioma', False],
    ]


def test_usable_dropsThePatientsThatWouldStop(writeCohort, capsys):
    """A patient with a broken file is dropped and named, one with a suspicious file stays; none left is an error."""
    df = writeCohort(BAD['NaN'][2])
    findings = cohort.checkFiles(df)
    assert list(cohort.usable(df, findings).index) == ['BraTS20_Training_001']
    assert 'BraTS20_Training_002 is left out: BraTS20_Training_002_flair.nii.gz: ' in capsys.readouterr().out
    with pytest.raises(ValueError, match='None of the 1 patients can be used'):
        cohort.usable(df[1:], findings)
    suspicious = writeCohort(SUSPICIOUS['no tumor'][2])
    assert cohort.usable(suspicious, cohort.checkFiles(suspicious)).equals(suspicious)


def test_checkFiles_readsTheDecathlon(tmp_path):
    """Good 4-D patients have no finding; a file that is gone, or an unknown name, has one."""
    cases = drawCases(2, 0)
    writeLayout('Decathlon', tmp_path, [(image, classes.clip(1)) for image, classes in cases])
    df = patients.makeFileList(tmp_path)
    assert len(cohort.checkFiles(df)) == 0
    df.loc['BRATS_002', 'seg'] = str(tmp_path / 'gone.nii.gz')
    table = cohort.checkFiles(df)
    assert table.values.tolist() == [['BRATS_002', 'gone.nii.gz', 'does not exist.', True]]
    unknown = pd.DataFrame({name: f'Smith_{name}.nii' for name in COLUMNS}, index=['Smith'])
    assert 'the edition cannot be detected' in cohort.checkFiles(unknown)['finding'].item()


def test_split_isAPartitionBySeed():
    """Every patient is in one set; the same seed gives the same sets in any order of rows, another seed others."""
    config.VAL_FRACTION, config.TEST_FRACTION = 0.1, 0.3
    table = listOf(40)
    sets = cohort.split(table)
    assert [len(part) for part in sets] == [24, 4, 12]
    assert sorted(itertools.chain(*(part.index for part in sets))) == list(table.index)
    again = cohort.split(table.sample(frac=1, random_state=1))
    assert all(list(a.index) == list(b.index) for a, b in zip(sets, again, strict=True))
    config.SEED = 1
    assert list(cohort.split(table)[2].index) != list(sets[2].index)
    config.VAL_FRACTION = 0.7
    with pytest.raises(ValueError, match=r'take 28 \+ 12 of 40 subjects: none is left to train'):
        cohort.split(table)


@pytest.mark.parametrize('number', range(3, 12))
def test_split_leavesNoSetEmptyFromThreePatientsOn(number):
    """However few the patients, each of the three sets has one."""
    assert all(len(part) for part in cohort.split(listOf(number)))


def test_split_saysThatTwoSubjectsAreTooFew(tmp_path, capsys):
    """Three patients of two subjects leave the test set empty, and a message says why."""
    ids = [f'BraTS-GLI-{number}' for number in ('00001-000', '00001-001', '00002-000')]
    parts = cohort.split(listEmptyFiles(tmp_path, *ids))
    words = '3 patients are 2 subjects; three are needed for a set to validate and one to test'
    assert len(parts[2]) == 0 and words in capsys.readouterr().out


def test_split_countsPatientsWithoutSegmentation(capsys):
    """Patients without a segmentation, None or NaN, are in no set, and their number is printed."""
    table = listOf(6)
    table.loc['BraTS2021_00001', 'seg'] = None
    table.loc['BraTS2021_00004', 'seg'] = np.nan
    sets = cohort.split(table)
    assert sum(map(len, sets)) == 4
    assert '2 of 6 patients have no segmentation' in capsys.readouterr().out
    with pytest.raises(ValueError, match='None of the 6'):
        cohort.split(table.assign(seg=None))


def test_split_keepsTheMixOfGrades(tmp_path):
    """With 30 HGG and 10 LGG in name_mapping.csv every set has three HGG to one LGG."""
    ids = [f'BraTS20_Training_{number:03d}' for number in range(40)]
    expected = ['HGG'] * 30 + ['LGG'] * 10
    pd.DataFrame({'Grade': expected, 'BraTS_2020_subject_ID': ids}).to_csv(tmp_path / 'name_mapping.csv', index=False)
    config.VAL_FRACTION = config.TEST_FRACTION = 0.2
    table = listEmptyFiles(tmp_path, *ids)
    grades = cohort.readGrades(table)
    assert list(grades) == expected
    counts = [grades[part.index].value_counts().to_dict() for part in cohort.split(table)]
    assert counts == [{'HGG': 18, 'LGG': 6}, {'HGG': 6, 'LGG': 2}, {'HGG': 6, 'LGG': 2}]


def test_split_keepsTimePointsTogether(tmp_path):
    """Three scans of each of ten subjects: no subject is in two sets, for any seed."""
    table = listEmptyFiles(tmp_path, *(f'BraTS-GLI-{i:05d}-{t:03d}' for i in range(10) for t in range(3)))
    for config.SEED in range(5):
        sets = [{patient[:15] for patient in part.index} for part in cohort.split(table)]
        assert [len(part) for part in sets] == [6, 2, 2] and len(set.union(*sets)) == 10


def test_split_printsWhichPatientsItKeepsTogether(tmp_path, capsys):
    """Two ids that may be one subject's are named and stay in one set; what no table can show is printed, too."""
    table = listEmptyFiles(tmp_path, *(f'BraTS2021_{i:05d}' for i in range(9)), 'BraTS-GLI-00004-000')
    sets = cohort.split(table)
    assert any({'BraTS2021_00004', 'BraTS-GLI-00004-000'} <= set(part.index) for part in sets)
    assert 'BraTS-GLI-00004-000 = BraTS2021_00004' in capsys.readouterr().out
    touch(tmp_path, 'imagesTr/BRATS_001.nii.gz', 'labelsTr/BRATS_001.nii.gz')
    cohort.split(patients.makeFileList(tmp_path))
    assert 'Decathlon may hold subjects of other editions' in capsys.readouterr().out


def test_splitFolds_testsEachPatientOnce():
    """Five folds of 23 patients: tests of 4 or 5, together everyone, never a patient in both parts; k is checked."""
    table = listOf(23)
    folds = cohort.splitFolds(table, 5)
    assert sorted(len(test) for _, test in folds) == [4, 4, 5, 5, 5]
    assert sorted(itertools.chain(*(test.index for _, test in folds))) == list(table.index)
    assert all(len(train) + len(test) == 23 and not set(train.index) & set(test.index) for train, test in folds)
    for k in (1, 24):
        with pytest.raises(ValueError, match=f'k is {k}; 2 to 23, the number of subjects'):
            cohort.splitFolds(table, k)


def test_writeSplit_keepsTheSplitOfARun(tmp_path):
    """readSplit returns what was written; beside a checkpoint, another split does not replace that of the run."""
    config.OUTPUT_FOLDER, file = str(tmp_path), tmp_path / 'split.json'
    sets, others = cohort.split(listOf(9)), cohort.split(listOf(12))
    cohort.writeSplit(others, file)
    cohort.writeSplit(sets, file)
    touch(tmp_path, 'last.pt')
    cohort.writeSplit(sets, file)
    with pytest.raises(ValueError, match=r'split\.json is the split of the run in this folder'):
        cohort.writeSplit(others, file)
    again = cohort.readSplit(file, listOf(9))
    assert all(one.equals(other) for one, other in zip(sets, again, strict=True))
    assert json.loads(file.read_text())['val'] == list(sets[1].index)


FIRST = 'BraTS2021_00000'


@pytest.mark.parametrize(
    ('sets', 'words'),
    [
        ({'train': ['Smith'], 'val': [], 'test': []}, r"in two sets: none; not in the file list: \['Smith'\]"),
        ({'train': [FIRST], 'val': [FIRST], 'test': []}, rf"in two sets: \['{FIRST}'\]; not in the file list: none"),
        ({'train': [], 'val': [], 'test': [], 'more': []}, 'the sets train, val, test were expected'),
        ({'train': [FIRST]}, 'the sets train, val, test were expected'),
        ([FIRST], 'the sets train, val, test were expected'),
    ],
)
def test_readSplit_refusesEachFault(tmp_path, sets, words):
    """An unknown patient, one in two sets, a set too many or too few, and a list are refused, each by itself."""
    (tmp_path / 'split.json').write_text(json.dumps(sets))
    with pytest.raises(ValueError, match=words):
        cohort.readSplit(tmp_path / 'split.json', listOf(2))


def test_readSplit_warnsOfASubjectInTwoSets(tmp_path, capsys):
    """A subject under two names in two sets is named in a warning; patients in no set are counted."""
    table = listEmptyFiles(tmp_path, *(f'BraTS2021_{i:05d}' for i in range(4)), 'BraTS-GLI-00002-000')
    sets = {'train': ['BraTS2021_00002'], 'val': [FIRST], 'test': ['BraTS-GLI-00002-000']}
    (tmp_path / 'split.json').write_text(json.dumps(sets))
    with pytest.warns(UserWarning, match='BraTS-GLI-00002-000 = BraTS2021_00002') as caught:
        cohort.readSplit(tmp_path / 'split.json', table)
    assert caught[0].filename == __file__  # the caller's line, not one of cohort.py
    assert '2 of 5 patients are in no set' in capsys.readouterr().out


def test_readGrades_acceptsATableWithGaps(tmp_path):
    """A patient without a grade in the table is unknown; a file that is no table is named."""
    table = listEmptyFiles(tmp_path, 'BraTS20_Training_001', 'BraTS20_Training_002')
    rows = pd.DataFrame({'Grade': ['HGG', None], 'BraTS_2020_subject_ID': list(table.index)})
    rows.to_csv(tmp_path / 'name_mapping.csv', index=False)
    assert list(cohort.readGrades(table)) == ['HGG', 'unknown']
    (tmp_path / 'name_mapping.csv').write_text('')
    with pytest.raises(ValueError, match=r'name_mapping\.csv is not a table of names'):
        cohort.readGrades(table)


def test_readSites_readsNamesOf2018And2019(tmp_path):
    """The site is in a patient's own name, or in that of an earlier year in its row of a table; else it is unknown."""
    ids = ['Brats18_CBICA_AAB_1', 'BraTS19_TCIA01_335_1', 'BraTS20_Training_001', 'BraTS20_Training_002']
    table = listEmptyFiles(tmp_path, *ids)
    csv = pd.DataFrame({'BraTS_2018_subject_ID': ['Brats18_2013_2_1', None], 'BraTS_2020_subject_ID': ids[2:]})
    csv.to_csv(tmp_path / 'name_mapping.csv', index=False)
    assert cohort.readSites(table).to_dict() == dict(zip(ids, ['CBICA', 'TCIA01', '2013', 'unknown'], strict=True))


def test_findSubjects_linksNamesOfSeveralYears(tmp_path):
    """A row of a published table links two names; without one, equal numbers of 2021 and 2023 do."""
    first, second, third = 'BraTS2021_00007', 'BraTS-GLI-00007-000', 'BraTS-GLI-00008-000'
    table = listEmptyFiles(tmp_path, 'BraTS20_Training_001', 'BraTS19_X_1', first, second, third)
    csv = pd.DataFrame(
        {'Grade': ['LGG'], 'BraTS_2019_subject_ID': ['BraTS19_X_1'], 'BraTS_2020_subject_ID': ['BraTS20_Training_001']}
    )
    csv.to_csv(tmp_path / 'name_mapping.csv', index=False)
    assert cohort.findSubjects(table).to_dict() == {
        second: second,
        first: second,
        third: third,
        'BraTS19_X_1': 'BraTS19_X_1',
        'BraTS20_Training_001': 'BraTS19_X_1',
    }
    mapping = pd.DataFrame({'BraTS2023': [third], 'BraTS2021': [first], 'Site': ['X']})
    mapping.to_excel(tmp_path / 'BraTS2023_2017_GLI_Mapping.xlsx', index=False)
    subjects = cohort.findSubjects(table)
    assert subjects[first] == subjects[third] != subjects[second]


TIMES = [f'BraTS-{kind}-{i:05d}-{t:03d}' for kind in ('SSA', 'GLI') for i in range(5) for t in range(2)]


@pytest.mark.parametrize(
    ('ids', 'rows', 'sizes'),
    [
        (TIMES, [(patient, 'a site') for patient in TIMES], [2] * 10),  # time points, where no number links them
        # two names that a third one links
        (
            ['BraTS19_A_1', 'BraTS19_B_1', 'BraTS20_Training_001'],
            [('BraTS19_A_1', 'BraTS20_Training_001'), ('BraTS19_B_1', 'BraTS20_Training_001')],
            [3],
        ),
        (['BraTS2021_00009', 'BraTS-GLI-00007-000'], [('BraTS-GLI-00007', 'BraTS2021_00009')], [2]),  # all time points
    ],
)
def test_findSubjects_chainsLinks(tmp_path, ids, rows, sizes):
    """Links of time points and of a table's rows add up, whether the table names time points or not."""
    pd.DataFrame(rows, columns=['one', 'other']).to_csv(tmp_path / 'name_mapping_x.csv', index=False)
    subjects = cohort.findSubjects(listEmptyFiles(tmp_path, *ids))
    assert subjects.groupby(subjects).size().tolist() == sizes


def test_describeCohort_measuresEachClassInItsColumn(tmp_path):
    """1, 2 and 3 voxels of 10 mm3 are 0.01, 0.02 and 0.03 ml, NaN without a segmentation; a folder LGG is a grade."""
    label = np.zeros((4, 5, 6), np.uint8)
    label[0, 0, 0], label[1, 0, :2], label[2, 0, :3] = 1, 2, 4
    for patient, columns in (('BraTS19_A_1', COLUMNS), ('BraTS19_B_1', COLUMNS[:4])):
        for column in columns:
            save(label, tmp_path / 'LGG' / patient / f'{patient}_{column}.nii.gz', np.diag([2, 1, 5, 1]))
    table = cohort.describeCohort(patients.makeFileList(tmp_path))
    assert list(table.columns) == ['edition', 'grade', 'subject', 'necrotic core', 'edema', 'enhancing tumor']
    assert table.iloc[0].tolist() == ['BraTS2019', 'LGG', 'BraTS19_A_1', *map(pytest.approx, (0.01, 0.02, 0.03))]
    assert table.iloc[1, 3:].isna().all()


def test_describeCohort_leavesOutBadPatientsOnRequest(writeCohort):
    """A segmentation that cannot be read ends it, or is left out of the table, as config says."""
    df = writeCohort(BAD['an image for a seg'][2])
    with pytest.raises(ValueError, match='BraTS20_Training_002'):
        cohort.describeCohort(df)
    config.ON_BAD_PATIENT = 'leaveOut'
    assert list(cohort.describeCohort(df).index) == ['BraTS20_Training_001']
