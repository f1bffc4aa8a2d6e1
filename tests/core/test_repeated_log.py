"""Log lines that differ in their file alone are said once, with a count."""

from utils.core.repeated_log import log_repeats_once
from utils.core.runtime import log


def test_equal_reasons_are_told_once_with_a_count(caplog):
    caplog.set_level("INFO", "litemil")
    with log_repeats_once():
        for number in range(117):
            log.warning("%s: its um/px is unknown (%s)", f"slides/s{number:03d}.png", "not in the file")
        log.warning("%s: its um/px is unknown (%s)", "slides/s000.png", "not in the file")
        log.warning("%s: its um/px is unknown (%s)", "other.svs", "x and y disagree")
        log.error("%s: damaged", "bad.svs")
        log.error("%s: damaged", "as_bad.svs")
        log.info("%s: as it is", "a")
        log.info("%s: as it is", "b")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "slides/s000.png: its um/px is unknown (not in the file)"),
        ("WARNING", "other.svs: its um/px is unknown (x and y disagree)"),
        ("ERROR", "bad.svs: damaged"),
        ("INFO", "a: as it is"),
        ("INFO", "b: as it is"),
        (
            "WARNING",
            "the same of 116 more (s001.png, s002.png, s003.png and 113 more): its um/px is unknown (not in the file)",
        ),
        ("ERROR", "as_bad.svs: damaged"),
    ]
    log.warning("%s: its um/px is unknown (%s)", "c.png", "not in the file")
    log.warning("%s: its um/px is unknown (%s)", "d.png", "not in the file")
    assert [record.getMessage()[:5] for record in caplog.records[-2:]] == ["c.png", "d.png"]
