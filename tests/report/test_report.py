"""Test the offline page: what it holds by parsing it, and how it behaves in Debian's Chromium where there is one."""

import base64
import hashlib
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import config
import metrics
import patients
import phantom
import postprocess
import report
from patients import editions, reading
from postprocess import quality

QUALITY = ['patient', 'region', 'predictedDice', 'low', 'high', 'isFlagged']
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')


class Page(HTMLParser):
    """The rows, cells, scripts and attributes of a page."""

    def __init__(self, file):
        super().__init__()
        self.tags, self.rows, self.scripts, self.text = [], [], {}, ''
        self._open, self._isBody, self._isScript = None, False, False
        self.source = Path(file).read_text(encoding='utf-8')
        self.feed(self.source)

    def handle_starttag(self, tag, pairs):
        attributes = dict(pairs)
        self.tags.append((tag, attributes))
        if tag == 'tr' and 'data-index' in attributes:
            self.rows.append(
                {'kinds': json.loads(attributes['data-kinds']), 'opens': 'opens' in attributes.get('class', '')}
            )
        if tag == 'td' and self.rows and 'data-label' in attributes:
            value = attributes['data-value']
            self.rows[-1][attributes['data-label']] = float(value) if value else None
        if tag == 'td' and attributes.get('class') == 'name':
            self.rows[-1]['patient'] = attributes['data-value']
        self._isScript = attributes.get('id', 'program') if tag == 'script' else False

    def handle_data(self, data):
        if self._isScript:
            self.scripts[self._isScript] = self.scripts.get(self._isScript, '') + data
        else:
            self.text += data

    def handle_endtag(self, tag):
        self._isScript = False

    def row(self, patient):
        [row] = [row for row in self.rows if row['patient'] == patient]
        return row

    def badges(self):
        return {pairs['title'] for _, pairs in self.tags if 'badge' in pairs.get('class', '')}

    def svgs(self):
        addresses = [pairs['src'] for tag, pairs in self.tags if tag == 'img' and 'svg' in pairs['src']]
        return [base64.b64decode(address.split(',')[1]) for address in addresses]

    def case(self, patient):
        cases = [json.loads(text) for name, text in self.scripts.items() if name.startswith('case-')]
        return next(case for case in cases if case['patient'] == patient)


@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    """A folder of four phantoms; the fourth has no enhancing tumor."""
    folder = tmp_path_factory.mktemp('phantoms') / 'data'
    phantom.makeCases(folder, 4, shape=(40, 40, 24))
    return folder


@pytest.fixture
def folder(phantoms, tmp_path, monkeypatch):
    """A folder of segmentations: the truth, the truth moved by two voxels, nothing, and the truth. No charts: slow."""
    monkeypatch.setattr(report.report, '_drawCharts', lambda *arguments: [])
    config.DATA_FOLDER, config.BOOTSTRAP_RESAMPLES = str(phantoms), 50
    changes = [lambda y: y, lambda y: np.roll(y, 2, 1), lambda y: 0 * y, lambda y: y]
    for change, (patient, paths) in zip(changes, patients.makeFileList().iterrows(), strict=True):
        y = np.moveaxis(patients.readLabel(paths), 2, 0)
        patients.saveSegmentation(change(y), paths, tmp_path / 'predictions' / f'{patient}.nii.gz')
    return tmp_path / 'predictions'


def nameOf(number):
    return f'BraTS20_Training_{number:03d}'


def saveLabels(labels, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(labels, np.uint8), np.eye(4)), file)


def test_writeReport_showsVolumesAndScores(folder):
    """The cells equal what scoreFolder and the labels say; the perfect, the moved and the empty one are told apart."""
    page = Page(report.writeReport(folder))
    table = postprocess.scoreFolder(patients.makeFileList(), folder).set_index(['patient', 'region'])
    assert [row['patient'] for row in page.rows] == [nameOf(number) for number in (1, 2, 3, 4)]
    for row in page.rows:
        for region in ('WT', 'TC', 'ET'):
            expected = table.loc[(row['patient'], region)]
            assert row[f'{region} Dice'] == pytest.approx(expected['dice'])
            assert row[f'{region} HD95'] == pytest.approx(expected['hd95'])
            assert row[f'{region} ml'] == pytest.approx(expected['volumePredicted'])
    labels = nib.load(folder / f'{nameOf(1)}.nii.gz').get_fdata()
    assert page.row(nameOf(1))['ET ml'] == pytest.approx((labels == 4).sum() / 1000)
    assert page.row(nameOf(1))['WT Dice'] == 1 and 0 < page.row(nameOf(2))['WT Dice'] < 1
    assert page.row(nameOf(3))['kinds'] == ['empty', 'low Dice'] and 'no ET' in page.row(nameOf(4))['kinds']
    summary = metrics.summarize(table.reset_index())
    assert f'{summary.loc[("WT", "dice"), "mean"]:.3f}' in page.text


def test_writeReport_leavesOutPlanesIfThereAreTooMany(folder, monkeypatch):
    """Of four patients, the first two keep their planes, all keep their row, and the page says so."""
    monkeypatch.setattr(report.report, '_MOST', 2)
    page = Page(report.writeReport(folder))
    assert len(page.rows) == 4 and sum(name.startswith('case-') for name in page.scripts) == 2
    assert page.case(nameOf(1)) and page.case(nameOf(2)) and 'The planes and details of 2 are left out' in page.text


def test_writeReport_drawsTheCohort(folder, monkeypatch):
    """Three charts as SVG inside the page where there is a truth, one without; a figure is not left open."""
    monkeypatch.undo()
    for place, number in ((config.DATA_FOLDER, 3), (None, 1)):
        config.DATA_FOLDER = place
        svgs = Page(report.writeReport(folder)).svgs()
        assert len(svgs) == number and all(b'<svg' in svg for svg in svgs) and not plt.get_fignums()


def test_writeReport_loadsNothing(folder):
    """Every address is inside the page, only the page's own script may run, and no folder of this machine is named."""
    page = Page(report.writeReport(folder))
    addresses = [pairs[name] for _, pairs in page.tags for name in ('src', 'href', 'srcset', 'action') if name in pairs]
    assert len(addresses) >= 4 and all(address.startswith('data:image/') for address in addresses)
    assert not re.search(r'url\(|@import|https?:', page.source)
    [policy] = [pairs['content'] for _, pairs in page.tags if pairs.get('http-equiv') == 'Content-Security-Policy']
    checksum = base64.b64encode(hashlib.sha256(page.scripts['program'].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{checksum}'" in policy
    assert str(folder.parent) not in page.source and config.DATA_FOLDER not in page.source


@pytest.mark.parametrize(
    'name', ['<img src=x onerror=alert(1)>', '"\'><b>', '{{ 7 * 7 }}', '</script><script>alert(1)</script>']
)
def test_writeReport_escapesNames(phantoms, folder, name):
    """A patient's name is text wherever it stands, with a segmentation or without one."""
    df = patients.makeFileList()[:1].rename(index={nameOf(1): name})
    if '/' not in name:
        shutil.copy(folder / f'{nameOf(1)}.nii.gz', folder.parent / f'{name}.nii.gz')
    page = Page(report.writeReport(folder.parent, df))
    assert page.row(name)['patient'] == name
    assert '/' in name or page.case(name)['patient'] == name
    assert [tag for tag, _ in page.tags].count('b') == 3 + 3 * ('/' not in name)  # those of the tiles
    assert not any('onerror' in pairs for _, pairs in page.tags)
    assert sum(tag == 'script' and 'type' not in pairs for tag, pairs in page.tags) == 1


def test_writeReport_namesWhatCannotBeRead(folder):
    """Half a file, an unknown label, a foreign grid and a missing patient have a row with the reason, and no folder."""
    file = folder / f'{nameOf(1)}.nii.gz'
    file.write_bytes(file.read_bytes()[:200])
    saveLabels(np.full((40, 40, 24), 3), folder / f'{nameOf(2)}.nii.gz')
    saveLabels(np.ones((9, 9, 9)), folder / f'{nameOf(3)}.nii.gz')
    (folder / f'{nameOf(4)}.nii.gz').unlink()
    saveLabels(np.ones((9, 9, 9)), folder / 'somebody.nii.gz')
    page = Page(report.writeReport(folder, patients.makeFileList()))
    assert [row['kinds'] for row in page.rows if row['patient'] == nameOf(1)] == [['cannot be read']]
    assert page.row(nameOf(2))['kinds'] == page.row('somebody')['kinds'] == ['cannot be read']
    assert page.row(nameOf(3))['kinds'].count('other files') == 1 and page.row(nameOf(3))['opens']
    assert page.row(nameOf(4))['kinds'] == ['no segmentation'] and not page.row(nameOf(4))['opens']
    for text in ('knows [0, 1, 2, 4]', 'Set config.EDITION', 'voxels', f'has no {nameOf(4)}.nii.gz'):
        assert text in page.text
    assert str(folder.parent) not in page.source and config.DATA_FOLDER not in page.source


def test_writeReport_worksWithoutImages(folder):
    """Without a file list the volumes and planes of the segmentations are shown, and nothing is scored."""
    config.DATA_FOLDER = None
    page = Page(report.writeReport(folder))
    assert len(page.rows) == 4 and all(row['opens'] for row in page.rows)
    assert page.row(nameOf(1))['WT ml'] > 0 and 'WT Dice' not in page.row(nameOf(1))
    assert page.case(nameOf(1))['packed']['images'] == {} and not page.case(nameOf(1))['packed']['hasTruth']


def test_writeReport_showsTheFoldersPatientsOnlyUnlessAFileListIsGiven(folder):
    """Others below config.DATA_FOLDER are counted; those of a file list that is given are named."""
    for number in (2, 3):
        (folder / f'{nameOf(number)}.nii.gz').unlink()
    page = Page(report.writeReport(folder))
    assert len(page.rows) == 2 and 'has 2 others' in page.text
    page = Page(report.writeReport(folder, patients.makeFileList()))
    assert len(page.rows) == 4 and [row['kinds'] for row in page.rows[:2]] == [['no segmentation']] * 2


def test_writeReport_leavesUploadAlone(folder):
    """Of the folder that predictFolder writes, or its upload, the page lies beside upload, not in it."""
    home = folder.parent / 'run'
    shutil.move(folder, home / 'upload')
    before = sorted((home / 'upload').iterdir())
    assert report.writeReport(home) == report.writeReport(home / 'upload') == home / 'report.html'
    assert sorted((home / 'upload').iterdir()) == before


def test_writeReport_keepsTheOldPageIfItFails(folder, monkeypatch):
    """A page that cannot be finished leaves the earlier one as it was, and no half one."""
    file = report.writeReport(folder)
    content = file.read_bytes()
    monkeypatch.setattr(report.report, '_render', lambda content: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.writeReport(folder)
    assert file.read_bytes() == content and not list(folder.glob('*.part'))


def test_writeReport_showsPredictedDiceAndSortsByIt(folder):
    """The lowest predicted Dice is first, a flag is a warning; what is older than a segmentation is not shown."""
    rows = [(1, 0.9, 0.8, 0.95, False), (2, 0.4, 0.2, 0.6, True), (4, 0.3, 0.1, 0.5, True)]
    rows = [(nameOf(number), 'WT', *values) for number, *values in rows]
    pd.DataFrame(rows, columns=QUALITY).to_csv(folder / 'quality.csv', index=False)
    later = (folder / 'quality.csv').stat().st_mtime + 10
    os.utime(folder / f'{nameOf(4)}.nii.gz', (later, later))
    page = Page(report.writeReport(folder))
    assert [row['patient'] for row in page.rows] == [nameOf(number) for number in (2, 1, 3, 4)]
    assert page.row(nameOf(2))['WT predicted Dice'] == 0.4 and page.row(nameOf(3))['WT predicted Dice'] is None
    assert 'flagged' in page.row(nameOf(2))['kinds'] and 'flagged' not in page.row(nameOf(1))['kinds']
    assert 'stale' in page.row(nameOf(4))['kinds'] and page.row(nameOf(4))['WT predicted Dice'] is None
    again = pd.DataFrame([*rows, (nameOf(2), 'WT', 0.7, 0.6, 0.8, 'low')], columns=QUALITY)
    again.to_csv(folder / 'quality.csv', index=False)
    row = Page(report.writeReport(folder)).row(nameOf(2))
    assert row['WT predicted Dice'] == 0.7 and 'flagged' in row['kinds']  # the last row, flagged in words
    for wrong, match in ((again.assign(low='half'), 'no number'), (again[['patient']], 'lacks the columns')):
        wrong.to_csv(folder / 'quality.csv', index=False)
        with pytest.raises(ValueError, match=match):
            report.writeReport(folder)


def test_writeReport_namesSuspiciousTruth(folder):
    """A Dice below its interval is a warning with its figures; one within it is none."""
    dice = Page(report.writeReport(folder)).row(nameOf(2))['WT Dice']
    rows = [
        (nameOf(1), 'WT', 0.9, 0, 1, 0),
        (nameOf(2), 'WT', 0.9, dice + 0.01, 1, 0),
        (nameOf(2), 'NCR', 0.9, 0, 1, 0),
    ]
    quality.writeQuality(folder, pd.DataFrame(rows, columns=QUALITY))
    page = Page(report.writeReport(folder))
    assert [row['patient'] for row in page.rows if 'suspicious truth' in row['kinds']] == [nameOf(2)]
    assert f'WT {dice:.2f}, {dice + 0.01:.2f} to 1.00 was expected' in page.badges()


def test_writeReport_readsWhatWriteQualityWrote(folder):
    """Estimates and flags are those of `quality.csv`: low for one, none for one without a voxel, which comes first."""
    rows = {'members': 1, 'planes': 3, 'voxels': [9, 9, 0], 'planeDice': [0.9, 0.5, 1], 'planeSpread': 0, 'entropy': 0}
    table = pd.DataFrame({'patient': [nameOf(number) for number in (1, 2, 3)], 'region': 'WT', **rows})
    table.to_csv(folder / 'disagreement.csv', index=False)
    own = {'measures': ['planeDice'], 'intercept': 1.0, 'slopes': [1.0], 'reach': 1.0, 'patients': 9}
    quality.writeQuality(folder, {'level': 0.9, 'planes': 3, 'regions': {'WT': own}})
    page = Page(report.writeReport(folder))
    assert [row['patient'] for row in page.rows] == [nameOf(number) for number in (3, 2, 1, 4)]
    assert [row['WT predicted Dice'] for row in page.rows] == [None, 0.5, 0.9, None]
    assert ['flagged' in row['kinds'] for row in page.rows] == [True, True, False, False]
    assert {'WT no estimate', 'WT 0.50'} <= page.badges()


def test_writeReport_showsSegmentationsAloneOfAnyEdition(tmp_path):
    """Without images an id says the edition: UCSF-PDGM and one's own, though their segmentations are not named seg."""
    names = {'flair': ('flair',), 'mask': ('seg',)}
    config.OWN_EDITIONS = {'Clinic': editions.Edition(r'case\d+', names, {0: 0, 255: 1})}
    config.NO_CLASSES, config.DATA_FOLDER = 2, None
    saveLabels(np.full((20, 20, 20), 4), tmp_path / 'UCSF-PDGM-0004.nii.gz')
    saveLabels(np.full((20, 20, 10), 255), tmp_path / 'case7.nii.gz')
    page = Page(report.writeReport(tmp_path))
    assert [row['WT ml'] for row in page.rows] == [8, 4]
    assert 'ET' not in page.text and 'enhancing' not in page.text  # of two classes there is none
    saveLabels(np.ones((20, 20, 20)), tmp_path / 'anyone.nii.gz')
    assert Page(report.writeReport(tmp_path)).row('anyone')['kinds'] == ['cannot be read']


def test_writeReport_scoresTheCavityIfItIsAClass(tmp_path):
    """With five classes RC has a Dice, 6 of 7 for 3 of 4 slices, with four a volume only."""
    config.EDITION, config.DATA_FOLDER = 'BraTS2024', None
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[:4], truth[8:12] = 3, 4
    saveLabels(np.where(np.arange(20)[:, None, None] == 8, 0, truth), tmp_path / 'out' / 'BraTS-GLI-00001-100.nii.gz')
    saveLabels(truth, tmp_path / 'BraTS-GLI-00001-100-seg.nii.gz')
    seg = str(tmp_path / 'BraTS-GLI-00001-100-seg.nii.gz')
    df = pd.DataFrame({'seg': seg}, ['BraTS-GLI-00001-100'])
    for config.NO_CLASSES in (4, 5):
        row = Page(report.writeReport(tmp_path / 'out', df)).rows[0]
        assert row['RC ml'] == pytest.approx(1.2) and ('RC Dice' in row) == (config.NO_CLASSES == 5)
    assert row['RC Dice'] == pytest.approx(6 / 7)
    assert row['ET Dice'] == 1 and 'NCR Dice' not in row  # the columns are those of the volumes


def test_writeReport_doesNotScoreTrainingPatients(folder):
    """A patient that settings.json names as trained on is shown and not scored; settings are listed without folders."""
    settings = {'prediction': {'trainedOn': [nameOf(1)]}, 'config': {'SEED': 7, 'DATA_FOLDER': '/secret/place'}}
    (folder / 'settings.json').write_text(json.dumps(settings))
    page = Page(report.writeReport(folder))
    assert page.row(nameOf(1))['WT Dice'] is None and 'trained on' in page.row(nameOf(1))['kinds']
    assert page.row(nameOf(2))['WT Dice'] is not None
    assert 'SEED' in page.text and '/secret/place' not in page.source
    paths = patients.makeFileList().iloc[0]
    known = {'trainedOn': [], 'voxels': {'another name': reading.voxelChecksums(paths, ['t1ce'])}}
    (folder / 'settings.json').write_text(json.dumps({'prediction': known}))
    found = Page(report.writeReport(folder))
    assert found.row(nameOf(1))['WT Dice'] is None and found.row(nameOf(2))['WT Dice'] is not None
    (folder / 'settings.json').write_text(json.dumps({'prediction': {'trainedOn': None}}))  # not known
    assert Page(report.writeReport(folder)).row(nameOf(1))['WT Dice'] is not None


def test_writeReport_comparesScansAndNamesTheCavity(tmp_path):
    """Two scans of a subject of 2024: 8 ml of tumor fall to 1 ml, and 3.375 ml of cavity are a region of their own."""
    config.EDITION, config.DATA_FOLDER = 'BraTS2024', None
    before, after = np.zeros((2, 32, 32, 32), np.uint8)
    before[2:22, 2:22, 2:22] = 2
    after[2:12, 2:12, 2:12] = 3
    after[14:29, 14:29, 14:29] = 4
    saveLabels(before, tmp_path / 'BraTS-GLI-00001-100.nii.gz')
    saveLabels(after, tmp_path / 'BraTS-GLI-00001-101.nii.gz')
    for patient in ('BraTS-GLI-00002-100', 'BraTS-GLI-00002-101'):  # scans that cannot be read are not compared
        (tmp_path / f'{patient}.nii.gz').write_bytes(b'no NIfTI')
    page = Page(report.writeReport(tmp_path))
    first, second = page.row('BraTS-GLI-00001-100'), page.row('BraTS-GLI-00001-101')
    assert second['RC ml'] == pytest.approx(3.375) and second['WT ml'] == pytest.approx(1) and first['RC ml'] == 0
    assert len(page.svgs()) == 2 and '-7.0' in page.text and '+3.4' in page.text


def test_writeReport_refusesAFolderWithoutSegmentations(tmp_path):
    """A folder that is missing, or holds no NIfTI, is an error that says what was expected."""
    for folder, match in ((tmp_path / 'nowhere', 'does not exist'), (tmp_path, 'named <patient>')):
        with pytest.raises(FileNotFoundError, match=match):
            report.writeReport(folder)


@pytest.fixture(scope='module')
def browser():
    """Debian's Chromium, headless."""
    api = pytest.importorskip('playwright.sync_api')
    if CHROMIUM is None:
        pytest.skip('no chromium on this machine: apt-get install chromium')
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def openPage(browser):
    """Return a function that opens a file in a page which fails the test if a script fails or anything is requested."""
    problems, contexts = [], []

    def openFile(file, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on('pageerror', lambda error: problems.append(str(error)))
        page.on('console', lambda message: problems.append(message.text) if message.type == 'error' else None)
        page.on(
            'request',
            lambda request: problems.append(request.url) if not request.url.startswith(('data:', 'file:')) else None,
        )
        page.goto(Path(file).as_uri())
        return page

    yield openFile
    for context in contexts:
        context.close()
    assert problems == []


def visible(page):
    return page.eval_on_selector_all(
        'tbody tr:not([hidden]) .name[data-value]', 'cells => cells.map(c => c.dataset.value)'
    )


def test_page_sortsAndFilters(folder, openPage):
    """A heading sorts up and, at the second click, down; words and kinds of warnings filter."""
    page = openPage(report.writeReport(folder))
    dice = page.locator('th button[title^="Dice of whole tumor"]')
    dice.click()
    assert visible(page)[:2] == [nameOf(3), nameOf(2)]
    dice.click()
    assert visible(page)[-2:] == [nameOf(2), nameOf(3)]
    assert page.locator('th[aria-sort]').get_attribute('aria-sort') == 'descending'
    page.fill('#find', '003')
    assert visible(page) == [nameOf(3)] and page.inner_text('#count') == '1 of 4 patients'
    page.fill('#find', '')
    page.select_option('#kind', 'empty')
    assert visible(page) == [nameOf(3)]
    page.select_option('#kind', '-')
    assert nameOf(1) not in visible(page) or nameOf(3) not in visible(page)


def coloredPixels(page, plane):
    """Return the fractions (x, y) of the width and height at which a plane's pixels are colored, (n, 2)."""
    script = """plane => {
      const canvas = document.querySelector(`[data-plane=${plane}] canvas`);
      const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      const found = [];
      for (let i = 0; i < data.length; i += 4)
        if (Math.abs(data[i] - data[i + 2]) > 60)
          found.push([(i / 4) % canvas.width / canvas.width, Math.floor(i / 4 / canvas.width) / canvas.height]);
      return found;
    }"""
    return np.array(page.evaluate(script, plane)).reshape(-1, 2)


def test_page_showsASegmentationWhereItLies(tmp_path, writeCase, openPage):
    """Tumor at the patient's right, front and top is right and up in each plane, only where it is."""
    image, label = np.zeros((3, 40, 40, 40), np.float32), np.zeros((40, 40, 40), np.uint8)
    image[:, 2:38, 2:38, 2:38], label[28:34, 27:33, 26:32] = 50, 2
    paths = writeCase({'t1ce': image[0], 't2': image[1], 'flair': image[2]})
    saveLabels(label, tmp_path / 'out' / f'{nameOf(1)}.nii.gz')
    df = pd.DataFrame([paths | {'t1': None, 'seg': None}], [nameOf(1)])
    page = openPage(report.writeReport(tmp_path / 'out', df))
    page.click('button.open')
    page.wait_for_selector('#details tbody tr', state='attached')
    for plane in ('axial', 'coronal', 'sagittal'):
        places = coloredPixels(page, plane)
        assert len(places) > 50 and (places[:, 0] > 0.6).all() and (places[:, 1] < 0.4).all(), plane
    assert page.inner_text('[data-plane=axial] output') in [f'{number} of 40' for number in range(26, 32)]
    slider = page.locator('[data-plane=axial] input')
    slider.evaluate('slider => { slider.value = 0; slider.dispatchEvent(new Event("input")); }')
    assert len(coloredPixels(page, 'axial')) == 0 and len(coloredPixels(page, 'coronal')) > 50
    assert page.locator('#modes input').evaluate_all('all => all.map(one => one.value)') == ['prediction', 'image']


def test_page_isWorkedByKeys(folder, openPage):
    """Enter opens a patient, arrows move the slice, 4 shows the errors, ] goes on, Escape comes back to the row."""
    page = openPage(report.writeReport(folder))
    page.focus(f'button.open:text("{nameOf(1)}")')
    page.keyboard.press('Enter')
    page.wait_for_selector('#details tbody tr', state='attached')
    output = page.locator('[data-plane=axial] output')
    before = output.inner_text()
    page.focus('[data-plane=axial] input')
    page.keyboard.press('ArrowRight')
    assert int(output.inner_text().split()[0]) == int(before.split()[0]) + 1
    page.keyboard.press('4')
    assert page.locator('#modes input:checked').get_attribute('value') == 'errors'
    assert all(len(coloredPixels(page, plane)) == 0 for plane in ('axial', 'coronal', 'sagittal'))  # no error in it
    page.keyboard.press(']')
    page.locator('#viewer-name', has_text=nameOf(2)).wait_for()
    page.keyboard.press('Escape')
    assert not page.locator('#viewer').is_visible()
    page.locator(f':focus:text("{nameOf(2)}")').wait_for()  # focus comes with the close event


def test_page_followsTheThemeAndFitsAPhone(folder, openPage):
    """Dark where the system is dark, light after a click; at 390 pixels nothing is wider than the screen."""
    page = openPage(report.writeReport(folder), color_scheme='dark', viewport={'width': 390, 'height': 800})
    background = 'getComputedStyle(document.body).backgroundColor'
    assert page.evaluate(background) == 'rgb(16, 20, 27)'
    page.click('#theme')
    assert page.evaluate(background) == 'rgb(246, 247, 249)'
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    page.click('button.open >> nth=0')
    page.wait_for_selector('#details tbody tr', state='attached')
    assert page.evaluate('document.getElementById("viewer").scrollWidth') <= 390


def test_page_runsNoNameAsAScript(folder, openPage):
    """A name with a handler is shown as text in the table and in the viewer; nothing of it runs."""
    name = '<img src=x onerror=document.title=1>'
    shutil.copy(folder / f'{nameOf(1)}.nii.gz', folder / f'{name}.nii.gz')
    config.EDITION = 'BraTS2020'
    page = openPage(report.writeReport(folder))
    page.locator('button.open', has_text='onerror').click()
    page.wait_for_selector('#details tbody tr', state='attached')
    assert page.inner_text('#viewer-name') == name and page.title() != '1'
