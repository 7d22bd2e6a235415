"""What may be sent as metadata, and how it is read."""

from __future__ import annotations

import pytest

from mesh.errors import LocalProtocolError
from mesh.grpc.metadata import check_metadata, read_metadata


def test_values_are_sent_without_outer_spaces() -> None:
    assert check_metadata({"authorization": "Bearer a b ", "clusterid": ""}) == [
        ("authorization", "Bearer a b"),
        ("clusterid", ""),
    ]


@pytest.mark.parametrize("name", ["", "Upper", ":path", "grpc-timeout", "a b", "é", "a\n"])
def test_names_that_cannot_be_sent(name: str) -> None:
    with pytest.raises(LocalProtocolError):
        check_metadata({name: "x"})


@pytest.mark.parametrize("value", ["secret\r\n", "secret\0", "secret é"])
def test_values_that_cannot_be_sent_are_not_shown(value: str) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        check_metadata({"authorization": value})
    assert "secret" not in str(caught.value)


def test_reading_joins_repeated_names_and_leaves_pseudo_headers_out() -> None:
    headers = ((":path", "/"), ("a", "1"), ("b", "2"), ("a", "3"))
    assert read_metadata(headers) == {"a": "1,3", "b": "2"}
