"""Result files: complete, written at once, and refused when they are not."""

import json

import pytest

from jaxsys.errors import UsageError
from jaxsys.results import read_result, table, write_result


def test_round_trip(tmp_path):
    rows = [{"step_s": 1.5, "schedule": "dp"}]
    path = write_result(
        tmp_path / "deep" / "x.json", benchmark="x", kind="measured", config={"n": 1}, rows=rows
    )
    result = read_result(path)
    assert result["rows"] == rows
    assert result["hardware"]["cores"] >= 1
    assert "jax" in result["versions"]
    assert list(path.parent.iterdir()) == [path]  # no partial file is left


def test_an_unwritable_value_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_result(path, benchmark="x", kind="simulated", config={}, rows=[])
    before = path.read_text()
    with pytest.raises(TypeError):
        write_result(path, benchmark="x", kind="simulated", config={}, rows=[{"a": object()}])
    assert path.read_text() == before


def test_refuses_other_files(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(UsageError, match="not a result file"):
        read_result(path)
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(UsageError, match="lacks benchmark, config"):
        read_result(path)


def test_table_aligns_numbers_right_and_names_left():
    rows = [{"name": "a", "time_s": 1.0}, {"name": "long", "time_s": 10.25}]
    text = table(rows, {"name": "", "time_s": ".1f"})
    assert text.splitlines() == ["name  time_s", "a        1.0", "long    10.2"]
    assert table([]) == "(no rows)"
