"""Who shows what: rank 0 everything, other ranks what happens to them alone."""

import logging

import pytest

from oprd.observability.console import ANY_RANK, LOGGER, shown

logger = logging.getLogger("oprd.somewhere")


def log():
    logger.info("a step")
    logger.warning("all ranks know")
    logger.warning("one engine died", extra=ANY_RANK)


@pytest.mark.parametrize(
    ("rank", "out", "err"),
    [
        ("0", "a step\nwarning: all ranks know\nwarning: one engine died\n", ""),
        ("1", "", "rank 1: warning: one engine died\n"),
    ],
)
def test_a_rank_shows_what_is_its_to_show(monkeypatch, capsys, rank, out, err):
    monkeypatch.setenv("RANK", rank)  # as torchrun does, before there is a process group
    with shown():
        log()
    assert capsys.readouterr() == (out, err)


def test_a_record_is_shown_once_and_nothing_is_left_behind(capsys):
    before = (list(LOGGER.handlers), LOGGER.level, LOGGER.propagate)
    with shown():
        with shown():
            logger.info("inside")
        logger.info("[not markup]")
    logger.info("after")
    assert capsys.readouterr().out == "inside\n[not markup]\n"
    assert (LOGGER.handlers, LOGGER.level, LOGGER.propagate) == before
