"""One offline page of a folder of segmentations."""

from report.followup import compareScans, plotScans
from report.report import writeReport, writeTable

__all__ = ['compareScans', 'plotScans', 'writeReport', 'writeTable']
