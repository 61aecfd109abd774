from __future__ import annotations

from flows.errors import hide_password, one_line


def test_messages_are_one_line_without_passwords() -> None:
    error = ValueError("cannot reach\n  postgresql://me:secret@host/db \n" + "x" * 1000)
    assert one_line(error).startswith("cannot reach postgresql://***@host/db xxx")
    assert len(one_line(error)) <= 403
    assert hide_password("http://host:5000/a@b") == "http://host:5000/a@b"
    assert hide_password("sqlite:////home/a@b/mlflow.db") == "sqlite:////home/a@b/mlflow.db"
    assert hide_password("postgresql://me:se@cret@host/db") == "postgresql://***@host/db"
    assert (
        hide_password("mysql://host/db?user=me&Password=se%cret&ssl=1") == "mysql://host/db?user=me&Password=***&ssl=1"
    )
    assert one_line(TimeoutError()) == "TimeoutError"
