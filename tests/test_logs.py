"""One event a line, whatever is in it."""

import io
import json
import logging
import re

import pytest

from lightllm.logs import escape, setup_logging

NASTY = "a\nb\x1b[31m\x7f\u2028\udcff\u202e end"


@pytest.fixture(autouse=True)
def _root_logger_is_restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def logged(log_format, level="info"):
    stream = io.StringIO()
    setup_logging(log_format, level, "engine", stream)
    logger = logging.getLogger("lightllm.test")
    logger.debug("hidden")
    logger.info("nasty %s", NASTY)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("failed")
    return stream.getvalue().splitlines()


def test_text():
    first, second = logged("text")
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
    assert re.fullmatch(stamp + r" INFO engine lightllm\.test: nasty a\\nb\\x1b.*", first)
    assert first.isprintable()
    assert " ERROR engine lightllm.test: failed\\nTraceback" in second
    assert "two\\nlines" in second


def test_json():
    first, second = (json.loads(line) for line in logged("json"))
    assert first["message"] == f"nasty {NASTY}"
    assert (first["level"], first["process"], first["logger"]) == ("info", "engine", "lightllm.test")
    assert first["time"] > 1_700_000_000
    assert second["exception"].endswith("ValueError: two\nlines")
    assert all(line.isascii() and line.isprintable() for line in logged("json"))


def test_level_and_second_call():
    assert len(logged("text", "error")) == 1
    assert len(logged("text", "debug")) == 3


def test_escape_leaves_plain_text_alone():
    assert escape("caf\u00e9 \u4f60") == "caf\u00e9 \u4f60"
    assert escape("\udcff\x00") == "\\udcff\\x00"
