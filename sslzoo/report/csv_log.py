"""``metrics.csv`` through Lightning's logger interface, continued by a resumed run."""

import csv
import io
from pathlib import Path

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from sslzoo.checkpoints.files import write_text


class CsvLog(Logger):
    """One row per call; a new column rewrites the file, whole.

    Args:
        path: the file; rows already there are kept.

    Attributes:
        rows: all rows so far.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)
        self.rows: list[dict] = read_rows(self.path) if self.path.is_file() else []
        self._columns: list[str] = list(dict.fromkeys(key for row in self.rows for key in row))

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args, **kwargs) -> None:
        """The run's config lies beside this file."""

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drop rows of steps that a resumed run takes again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        row = {"step": step, **metrics}
        self.rows.append(row)
        new = [key for key in row if key not in self._columns]
        if new:
            self._columns += new
            self._rewrite()
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a ``metrics.csv``; empty cells are left out, numbers are numbers."""
    with Path(path).open(newline="") as file:
        return [
            {key: int(value) if key in ("step", "epoch") else float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
        ]
