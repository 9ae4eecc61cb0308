"""The documents hold exactly what the measurements say."""

import re

from bench import report


def test_tables_are_those_of_the_files():
    texts = [document.read_text() for document in report.DOCUMENTS]
    assert {name for text in texts for name in re.findall(r"<!-- table (\w+) -->", text)} == set(report.TABLES)
    assert [report.filled(text) for text in texts] == texts
