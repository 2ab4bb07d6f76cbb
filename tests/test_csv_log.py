"""metrics.csv: rows, new columns, what a resumed run forgets."""

import csv

import pytest
from pytorch_lightning.utilities import rank_zero_only

from sslzoo.report.csv_log import CsvLog, read_rows


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def lines(path):
    return path.read_text().splitlines()


def test_rows_of_known_columns_are_appended(path):
    log = CsvLog(path)
    log.log_metrics({"epoch": 0, "loss": 0.5}, step=10)
    inode = path.stat().st_ino
    log.log_metrics({"epoch": 1, "loss": 0.25}, step=20)
    log.log_metrics({"loss": 0.125}, step=30)
    assert lines(path) == ["step,epoch,loss", "10,0,0.5", "20,1,0.25", "30,,0.125"]
    assert path.stat().st_ino == inode


def test_a_new_column_rewrites_the_file_whole(path):
    log = CsvLog(path)
    log.log_metrics({"loss": 0.5}, step=1)
    log.log_metrics({"knn_top1": 0.75}, step=1)
    log.log_metrics({"loss": 0.25, "lr": 0.1}, step=2)
    assert lines(path) == ["step,loss,knn_top1,lr", "1,0.5,,", "1,,0.75,", "2,0.25,,0.1"]
    assert list(path.parent.iterdir()) == [path]


def test_what_is_read_is_what_was_logged(path):
    log = CsvLog(path)
    log.log_metrics({"epoch": 0, "loss": 1 / 3}, step=1)
    log.log_metrics({"knn_top1": 0.0}, step=2)
    log.log_metrics({"loss": float("nan")}, step=3)
    rows = read_rows(path)
    assert rows[:2] == log.rows[:2] == [{"step": 1, "epoch": 0, "loss": 1 / 3}, {"step": 2, "knn_top1": 0.0}]
    assert rows[2]["loss"] != rows[2]["loss"]
    assert [type(value) for value in rows[0].values()] == [int, int, float]


def test_a_resumed_run_keeps_rows_up_to_its_checkpoint_and_goes_on_in_the_same_columns(path):
    first = CsvLog(path)
    for step in (1, 2, 3):
        first.log_metrics({"loss": 1 / step}, step=step)
        first.log_metrics({"knn_top1": step / 4}, step=step)
    second = CsvLog(path)
    second.forget_after(2)
    assert lines(path) == ["step,loss,knn_top1", "1,1.0,", "1,,0.25", "2,0.5,", "2,,0.5"]
    second.log_metrics({"knn_top1": 0.875}, step=3)
    assert lines(path)[-1] == "3,,0.875"
    assert second.rows == read_rows(path)


def test_forgetting_everything_leaves_a_header(path):
    CsvLog(path).log_metrics({"loss": 1.0}, step=1)
    log = CsvLog(path)
    log.forget_after(0)
    assert lines(path) == ["step,loss"]
    assert CsvLog(path).rows == []


def test_only_rank_zero_writes(path, monkeypatch):
    log = CsvLog(path)
    log.log_metrics({"loss": 1.0}, step=1)
    before = path.read_bytes()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log.log_metrics({"loss": 2.0, "lr": 1.0}, step=2)
    log.forget_after(0)
    assert path.read_bytes() == before


def test_values_with_commas_or_quotes_survive(path):
    log = CsvLog(path)
    log.log_metrics({"note": 'a,"b"'}, step=1)
    with path.open(newline="") as file:
        assert next(csv.DictReader(file))["note"] == 'a,"b"'


def test_lightning_finds_what_it_asks_a_logger_for(path):
    log = CsvLog(path)
    assert (log.name, log.version) == ("csv", "")
    log.log_hyperparams({"a": 1})
    assert not path.exists()
