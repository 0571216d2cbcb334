import json
import tracemalloc

import numpy as np
import pytest

from jaxml.cli.main import main
from jaxml.kan import table

ROWS = [f"{n / 20 - 1},{'x' if n % 2 else 'y'},4,{2 * (n / 20 - 1) + 1}" for n in range(40)]


def written(tmp_path, lines, name="d.csv"):
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return path


def test_what_is_left_out_is_told(tmp_path):
    lines = ["a,word,same,y", *ROWS, "NA,x,4,1", "1e9,x,4,1", "inf,x,4,2"]
    found = table.read(written(tmp_path, lines), "y", drop_outliers=True)
    assert found.names == ["a"] and found.x.shape == (40, 1)
    text = " ".join(found.notes)
    for part in (
        "column word is left out: 43 of 43",
        "2 of 43 rows",
        "a has 1 values more than 20",
        "same is left out: it is 4",
    ):
        assert part in text
    assert table.read(written(tmp_path, lines), "y").x.shape == (41, 1)


@pytest.mark.parametrize(
    "lines,target,match",
    [
        ([], "y", "got 0 lines"),
        (["a,y"], "y", "got 1 lines"),
        (["a,y", "1,2", "3"], "y", "line 3 has 1 values"),
        (["a,a,y", "1,2,3"], "y", "'a' more than once"),
        (["a,y", "1,2"], "z", "no column 'z'"),
        (["a,y", "1,2"], "y", "at least 10 rows"),
        (["a,word,same,y", *ROWS], "word", "are no numbers"),
        (["a,word,same,y", *ROWS], "same", "nothing to predict"),
    ],
)
def test_tables_that_cannot_be_fitted_are_told(tmp_path, lines, target, match):
    path = tmp_path / "d.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=match):
        table.read(path, target)


def test_very_wide_tables_are_read_at_once_and_very_long_ones_not_at_all(tmp_path, monkeypatch):
    names = [f"c{n}" for n in range(8_000)]
    wide = written(tmp_path, [",".join([*names, "y"]), *(",".join(["1"] * 8_000 + [str(n)]) for n in range(12))])
    with pytest.raises(ValueError, match="no column of numbers is left"):
        table.read(wide, "y")
    with pytest.raises(ValueError, match=r"there are c0, .* and others"):
        table.read(wide, "z")
    monkeypatch.setattr(table, "TABLE_BYTES", 1000)
    with pytest.raises(ValueError, match="a table has at most 1,000 bytes"):
        table.read(wide, "y")


def test_semicolons_and_byte_order_marks_are_read(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(b"\xef\xbb\xbfa;y\n" + b"\n".join(f"{n};{n}".encode() for n in range(12)))
    assert table.read(path, "y").names == ["a"]
    path.write_bytes(b"\xff\xfe\x00a\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        table.read(path, "y")


@pytest.mark.slow
def test_the_command_finds_a_formula_and_writes_its_files(tmp_path, capsys):
    path = written(tmp_path, ["a,word,same,y", *ROWS])
    out = tmp_path / "out"
    options = "--target y --hidden 1 --restarts 1 --grids 5 --functions x sin".split()
    assert main(["kan", "fit", str(path), *options, "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "formula.npz", "formula.png", "found.json", "splines.npz", "splines.png",
    ]  # fmt: skip
    told = json.loads((out / "found.json").read_text())
    assert told["held_out_error"]["formula"] < 1e-3 and told["features"] == ["a"]
    assert "y = 2*a + 1" in capsys.readouterr().out
    assert np.isfinite(told["held_out_error"]["splines"])


def test_wrong_options_are_told(tmp_path, capsys):
    path = written(tmp_path, ["a,word,same,y", *ROWS])
    for extra, text in (
        (["--held-out", "2"], "between 0 and 1"),
        (["--functions", "sine"], "got 'sine'"),
        (["--features", "b"], "no column 'b'"),
        (["--out", str(path)], "--out is a folder"),
    ):
        assert main(["kan", "fit", str(path), "--target", "y", *extra]) == 2
        assert text in capsys.readouterr().err


TRIPLES = [f"{n},{n * n},{n % 3}" for n in range(12)]


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ('"a, b, c";y;z', ["a, b, c", "z"]),
        ('"a; b; c", "y", z', ["a; b; c", "z"]),
        ("body mass\ty\tz", ["body mass", "z"]),
    ],
)
def test_separators_are_those_outside_quotes(tmp_path, header, names):
    sign = next(s for s in ";\t," if s in header.replace('"a; b; c"', "").replace('"a, b, c"', ""))
    data = table.read(written(tmp_path, [header, *(row.replace(",", sign) for row in TRIPLES)]), "y")
    assert data.names == names


def test_columns_without_name_or_values_are_told(tmp_path):
    lines = [",y,b,", *(f"{n},{(n * 7) % 5},{n % 3}," for n in range(12))]
    data = table.read(written(tmp_path, lines), "y")
    assert data.names == ["b"]
    assert any("counts the rows" in note for note in data.notes)
    assert any("column_4 is left out: it has no values" in note for note in data.notes)
    assert table.read(written(tmp_path, lines), "y", ["column_1"]).names == ["column_1"]


def test_lines_are_counted_as_an_editor_does(tmp_path):
    with pytest.raises(ValueError, match="line 15 has 2 values, the header 3"):
        table.read(written(tmp_path, ["x,y,z", "", "  ", *TRIPLES[:11], "1,2"]), "y")


def test_an_underscore_is_no_part_of_a_number(tmp_path):
    with pytest.raises(ValueError, match="column 'y' has values that are no numbers, the first '1_000'"):
        table.read(written(tmp_path, ["x,y,z", *TRIPLES, "1,1_000,2"]), "y")


def test_too_many_rows_held_out_are_told(tmp_path, capsys):
    path = written(tmp_path, ["x,y,z", *TRIPLES])
    assert main(["kan", "fit", str(path), "--target", "y", "--held-out", "0.9"]) != 0
    assert "at least 8 rows are fitted, --held-out 0.9 leaves 1" in capsys.readouterr().err


def test_a_table_takes_about_the_memory_of_its_numbers(tmp_path):
    path, n = tmp_path / "long.csv", 100_000
    path.write_text("a,b,y\n" + "".join(f"{i % 7},{i % 5},{i % 3}\n" for i in range(n)))
    tracemalloc.start()
    table.read(path, "y")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 12 * 3 * 8 * n  # some copies of three columns; as text it would be ten times this


def test_no_file_and_a_folder_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.csv: no such file"):
        table.read(tmp_path / "missing.csv", "y")
    with pytest.raises(ValueError, match="a table is a CSV file, got a folder"):
        table.read(tmp_path, "y")
