import itertools
import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import COLUMNS, names, touch
from test_patients import volumesOf

import cohort
import config
import patients


def listOf(ids, seg=True):
    rows = {patient: [f'{patient}_{column}.nii' for column in COLUMNS] for patient in ids}
    table = pd.DataFrame.from_dict(rows, orient='index', columns=COLUMNS)
    return table if seg else table.assign(seg=None)


def test_split_isAPartitionBySeed():
    """Every annotated patient is in one set; the same seed gives the same sets, another seed others."""
    table = listOf([f'BraTS2021_{number:05d}' for number in range(40)])
    sets = cohort.split(table)
    assert [len(part) for part in sets] == [28, 6, 6]
    assert sorted(itertools.chain(*(part.index for part in sets))) == list(table.index)
    again = cohort.split(table.sample(frac=1, random_state=1))
    assert all(list(a.index) == list(b.index) for a, b in zip(sets, again, strict=True))
    config.SEED = 1
    assert list(cohort.split(table)[2].index) != list(sets[2].index)


@pytest.mark.parametrize('number', range(3, 12))
def test_split_leavesNoSetEmptyFromThreePatientsOn(number):
    """However few the patients, each of the three sets has one."""
    assert all(len(part) for part in cohort.split(listOf([f'BraTS2021_{i:05d}' for i in range(number)])))


def test_split_countsThoseWithoutSegmentation(capsys):
    """Patients without a seg, None or NaN, are in no set, and their number is printed."""
    table = listOf([f'BraTS2021_{number:05d}' for number in range(6)])
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
    for patient in ids:
        touch(tmp_path, *names(patient))
    grades = ['HGG'] * 30 + ['LGG'] * 10
    pd.DataFrame({'Grade': grades, 'BraTS_2020_subject_ID': ids}).to_csv(tmp_path / 'name_mapping.csv', index=False)
    config.VAL_FRACTION = config.TEST_FRACTION = 0.2
    table = patients.makeFileList(tmp_path)
    told = cohort.readGrades(table)
    assert list(told) == grades
    assert [told[part.index].value_counts().to_dict() for part in cohort.split(table)] == [
        {'HGG': 18, 'LGG': 6},
        {'HGG': 6, 'LGG': 2},
        {'HGG': 6, 'LGG': 2},
    ]


def namesNewer(patient):
    return [f'{patient}/{patient}-{end}.nii.gz' for end in ('t1n', 't1c', 't2w', 't2f', 'seg')]


def listNewer(tmp_path, *ids):
    for patient in ids:
        touch(tmp_path, *(namesNewer(patient) if '-GLI-' in patient else names(patient)))
    return patients.makeFileList(tmp_path)


def test_split_keepsTimePointsTogether(tmp_path):
    """Three scans of each of ten persons: no person is in two sets, for any seed."""
    table = listNewer(tmp_path, *(f'BraTS-GLI-{i:05d}-{t:03d}' for i in range(10) for t in range(3)))
    for config.SEED in range(5):
        sets = [{patient[:15] for patient in part.index} for part in cohort.split(table)]
        assert [len(part) for part in sets] == [6, 2, 2] and len(set.union(*sets)) == 10


def test_tellPersons_knowsNamesOfSeveralYears(tmp_path):
    """A row of a published table links two names; without one, equal numbers of 2021 and 2023 do."""
    table = listNewer(
        tmp_path, 'BraTS20_Training_001', 'BraTS19_X_1', 'BraTS2021_00007', 'BraTS-GLI-00007-000', 'BraTS-GLI-00008-000'
    )
    csv = pd.DataFrame(
        {'Grade': ['LGG'], 'BraTS_2019_subject_ID': ['BraTS19_X_1'], 'BraTS_2020_subject_ID': ['BraTS20_Training_001']}
    )
    csv.to_csv(tmp_path / 'name_mapping.csv', index=False)
    persons = cohort.tellPersons(table)
    assert persons.to_dict() == {
        'BraTS-GLI-00007-000': 'BraTS-GLI-00007-000',
        'BraTS2021_00007': 'BraTS-GLI-00007-000',
        'BraTS-GLI-00008-000': 'BraTS-GLI-00008-000',
        'BraTS19_X_1': 'BraTS19_X_1',
        'BraTS20_Training_001': 'BraTS19_X_1',
    }
    mapping = pd.DataFrame({'BraTS2023': ['BraTS-GLI-00008-000'], 'BraTS2021': ['BraTS2021_00007'], 'Site': ['X']})
    mapping.to_excel(tmp_path / 'BraTS2023_2017_GLI_Mapping.xlsx', index=False)
    persons = cohort.tellPersons(table)
    assert persons['BraTS2021_00007'] == persons['BraTS-GLI-00008-000'] != persons['BraTS-GLI-00007-000']


def test_split_saysWhomItKeepsTogether(tmp_path, capsys):
    """Suspected twins are named and stay in one set; what nothing can tell is said."""
    table = listNewer(tmp_path, *(f'BraTS2021_{i:05d}' for i in range(9)), 'BraTS-GLI-00004-000')
    sets = cohort.split(table)
    assert any({'BraTS2021_00004', 'BraTS-GLI-00004-000'} <= set(part.index) for part in sets)
    assert 'BraTS-GLI-00004-000 = BraTS2021_00004' in capsys.readouterr().out
    touch(tmp_path, 'imagesTr/BRATS_001.nii.gz', 'labelsTr/BRATS_001.nii.gz')
    cohort.split(patients.makeFileList(tmp_path))
    assert 'Decathlon and BraTS 2024 may hold persons of other editions' in capsys.readouterr().out


def test_splitFolds_testsEachPatientOnce(tmp_path):
    """Five folds of 23 patients: tests of 4 or 5, together everyone, never a patient in both parts."""
    table = listOf([f'BraTS2021_{number:05d}' for number in range(23)])
    folds = cohort.splitFolds(table, 5)
    assert sorted(len(test) for _, test in folds) == [4, 4, 5, 5, 5]
    assert sorted(itertools.chain(*(test.index for _, test in folds))) == list(table.index)
    assert all(len(train) + len(test) == 23 and not set(train.index) & set(test.index) for train, test in folds)
    for k in (1, 24):
        with pytest.raises(ValueError, match=f'{k} folds were asked for; 2 to 23'):
            cohort.splitFolds(table, k)


def test_readSplit_givesBackWhatWasWritten(tmp_path):
    """A split written to JSON and read again is the same; the file holds ids by set."""
    table = listOf([f'BraTS2021_{number:05d}' for number in range(10)])
    sets = cohort.split(table)
    cohort.writeSplit(sets, tmp_path / 'split.json')
    assert json.loads((tmp_path / 'split.json').read_text())['val'] == list(sets[1].index)
    again = cohort.readSplit(tmp_path / 'split.json', table)
    assert all(one.equals(other) for one, other in zip(sets, again, strict=True))


def test_readSplit_refusesAndWarnsByName(tmp_path, capsys):
    """A patient in two sets or unknown is refused, a person under two names in two sets warned of, others counted."""
    table = listNewer(tmp_path, *(f'BraTS2021_{i:05d}' for i in range(4)), 'BraTS-GLI-00002-000')

    def read(**sets):
        (tmp_path / 'split.json').write_text(json.dumps(sets))
        return cohort.readSplit(tmp_path / 'split.json', table)

    first = 'BraTS2021_00001'
    with pytest.raises(ValueError, match=rf"in two sets: \['{first}'\]; not in the file list: \['Smith'\]"):
        read(train=[first], val=[first], test=['Smith'])
    with pytest.raises(ValueError, match='the sets train, val, test were expected'):
        read(train=[first])
    with pytest.warns(UserWarning, match='BraTS-GLI-00002-000 = BraTS2021_00002'):
        read(train=['BraTS2021_00002'], val=[first], test=['BraTS-GLI-00002-000'])
    assert '2 of 5 patients are in no set' in capsys.readouterr().out


def test_describeCohort_measuresVolumes(tmp_path):
    """Ten voxels of 2 x 1 x 3 mm of label 4 are 0.06 ml of enhancing tumor; without a seg the volume is NaN."""
    label = np.zeros((4, 5, 6), np.uint8)
    label[0, :, :2] = 4
    for patient in ('BraTS19_A_1', 'BraTS19_B_1'):
        for column in COLUMNS[: 5 if patient == 'BraTS19_A_1' else 4]:
            file = tmp_path / 'LGG' / patient / f'{patient}_{column}.nii.gz'
            file.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(label, np.diag([2, 1, 3, 1])), file)
    table = cohort.describeCohort(patients.makeFileList(tmp_path))
    assert list(table.columns) == ['edition', 'grade', 'person', 'necrotic core', 'edema', 'enhancing tumor']
    assert table.iloc[0].tolist() == ['BraTS2019', 'LGG', 'BraTS19_A_1', 0, 0, pytest.approx(0.06)]
    assert table.iloc[1, 3:].isna().all()


def test_split_keepsTimePointsOfAfricaAndOfNamedPatientsTogether(tmp_path):
    """Time points stay together where no number tells it: African scans, and patients that a table of names has."""
    ids = [f'BraTS-{kind}-{i:05d}-{t:03d}' for kind in ('SSA', 'GLI') for i in range(5) for t in range(2)]
    for patient in ids:
        touch(tmp_path, *(f'{patient}/{patient}-{end}.nii.gz' for end in ('t1n', 't1c', 't2w', 't2f', 'seg')))
    pd.DataFrame({'BraTS2023': ids, 'Site': range(20)}).to_excel(tmp_path / 'BraTS2023_Mapping.xlsx', index=False)
    persons = cohort.tellPersons(patients.makeFileList(tmp_path))
    assert persons.groupby(persons).size().tolist() == [2] * 10


def test_tellPersons_chainsLinks(tmp_path):
    """Two groups that a third name links are one person, whatever the order in which the links are met."""
    table = listNewer(tmp_path, 'BraTS19_A_1', 'BraTS19_B_1', 'BraTS20_Training_001')
    rows = [('BraTS19_A_1', 'BraTS20_Training_001'), ('BraTS19_B_1', 'BraTS20_Training_001')]
    pd.DataFrame(rows, columns=['one', 'other']).to_csv(tmp_path / 'name_mapping_x.csv', index=False)
    assert cohort.tellPersons(table).nunique() == 1


def test_tellPersons_readsATableThatNamesPatientsWithoutTime(tmp_path):
    """A table that names BraTS-GLI-00007 means all time points of that person."""
    table = listNewer(tmp_path, 'BraTS2021_00009', 'BraTS-GLI-00007-000')
    csv = pd.DataFrame({'BraTS2023': ['BraTS-GLI-00007'], 'BraTS2021': ['BraTS2021_00009']})
    csv.to_csv(tmp_path / 'name_mapping.csv', index=False)
    assert cohort.tellPersons(table).nunique() == 1


def test_split_givesEachSetItsFraction():
    """VAL_FRACTION is the second set's, TEST_FRACTION the third's; fractions that leave nothing are refused."""
    table = listOf([f'BraTS2021_{number:05d}' for number in range(20)])
    config.VAL_FRACTION, config.TEST_FRACTION = 0.1, 0.3
    assert [len(part) for part in cohort.split(table)] == [12, 2, 6]
    config.VAL_FRACTION = 0.7
    with pytest.raises(ValueError, match=r'take 14 \+ 6 of 20 patients: none is left to train'):
        cohort.split(table)


def test_readSplit_refusesEachFaultAlone(tmp_path):
    """An unknown patient, one in two sets, and a set too many are refused, each by itself."""
    table = listOf(['BraTS2021_00001', 'BraTS2021_00002'])
    for sets, words in (
        ({'train': ['Smith'], 'val': [], 'test': []}, r'in two sets: none; not in the file list: \[.Smith.\]'),
        ({'train': ['BraTS2021_00001'], 'val': ['BraTS2021_00001'], 'test': []}, r'in two sets: \[.*\]; .*list: none'),
        ({'train': [], 'val': [], 'test': [], 'more': []}, 'the sets train, val, test were expected'),
    ):
        (tmp_path / 's.json').write_text(json.dumps(sets))
        with pytest.raises(ValueError, match=words):
            cohort.readSplit(tmp_path / 's.json', table)


def test_describeCohort_givesEachClassItsColumn(writeCase):
    """1, 2 and 3 voxels of 10 mm3 of the labels 1, 2 and 4 stand under their names."""
    label = np.zeros((4, 5, 6), np.uint8)
    label[0, 0, 0], label[1, 0, :2], label[2, 0, :3] = 1, 2, 4
    paths = writeCase(volumesOf(np.ones((3, 4, 5, 6), np.int16), label), affine=np.diag([2, 1, 5, 1]))
    row = cohort.describeCohort(pd.DataFrame([{'t1': None, **paths}], index=['BraTS20_Training_001'])).iloc[0]
    assert row[['necrotic core', 'edema', 'enhancing tumor']].tolist() == pytest.approx([0.01, 0.02, 0.03])


def test_readGrades_takesATableWithGaps(tmp_path):
    """A patient without a grade in the table is unknown; a file that is no table is named."""
    table = listNewer(tmp_path, 'BraTS20_Training_001', 'BraTS20_Training_002')
    rows = pd.DataFrame({'Grade': ['HGG', None], 'BraTS_2020_subject_ID': list(table.index)})
    rows.to_csv(tmp_path / 'name_mapping.csv', index=False)
    assert list(cohort.readGrades(table)) == ['HGG', 'unknown']
    (tmp_path / 'name_mapping.csv').write_text('')
    with pytest.raises(ValueError, match=r'name_mapping\.csv is not a table of names'):
        cohort.readGrades(table)
