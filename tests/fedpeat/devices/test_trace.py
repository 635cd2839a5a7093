import pytest

from fedpeat.core import DataError
from fedpeat.devices import Moment, read_trace

EXPECTED = {(1, "ann"): Moment(True, 2.5, None), (1, "bob"): Moment(False), (3, "ann"): Moment(True)}
CSV = "round,client,available,down_mbit,up_mbit\n1,ann,1,2.5,\n1,bob,0,,\n3,ann,true,,\n"
JSON = (
    '{"round": 1, "client": "ann", "down_mbit": 2.5}\n\n'
    '{"round": 1, "client": "bob", "available": false}\n{"round": 3, "client": "ann", "available": 1}\n'
)


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "trace"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


@pytest.mark.parametrize("text", [CSV, JSON, "\ufeff" + CSV, CSV.replace("\n", "\r\n"), CSV.replace(",", ", ")])
def test_a_trace_is_csv_or_json_lines(text, write):
    assert read_trace(write(text)) == EXPECTED


def test_columns_may_be_left_out(write):
    assert read_trace(write("client,round\nann,2\n")) == {(2, "ann"): Moment(True)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "nothing in it"),
        ("round,client\n", "nothing in it"),
        ("round,client\n0,ann\n", "line 2 .*round='0'"),
        ("round,client\n1.5,ann\n", "line 2 .*round='1.5'"),
        ("round,client\n1,\n", "line 2 .*no client"),
        ("client\nann\n", "line 2 .*no round"),
        ("round,client,availible\n1,ann,1\n", "did you mean 'available'"),
        ("round,client,available\n1,ann,maybe\n", "line 2 .*available='maybe'"),
        ("round,client,up_mbit\n1,ann,0\n", "line 2 .*up_mbit='0'.*available=0"),
        ("round,client,up_mbit\n1,ann,-1\n", "up_mbit='-1'"),
        ("round,client,down_mbit\n1,ann,fast\n", "down_mbit='fast'"),
        ("round,client,down_mbit\n1,ann,nan\n", "down_mbit='nan'"),
        ("round,client\n1,ann\n2,ann\n1,ann\n", "line 4 .*round 1 of client 'ann' comes a second time"),
        ("round,client\n1,ann,1\n", "line 2 .*more or fewer columns"),
        ("round,client,available\n1,ann\n", "line 2 .*more or fewer columns"),
        ('{"round": 1, "client": "ann"}\n{"round": 2', "line 2 "),
        ('{"round": 1, "client": "ann"}\n[1]', "line 2 .*no JSON object"),
        ('{"round": 1, "client": "ann", "up_mbit": true}', "up_mbit=True"),
        ('{"round": 1, "client": "ann", "up_mbit": [1]}', "line 1 .*up_mbit"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text, says, write):
    with pytest.raises(DataError, match=says):
        read_trace(write(text))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.csv"):
        read_trace(tmp_path / "nowhere.csv")
