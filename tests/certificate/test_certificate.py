"""A certificate: what it says, and that no byte of it can be changed unseen."""

import json
import subprocess
from pathlib import Path

import pytest
from report_inputs import HOSTILE, sample

from flows.certificate import certificate
from flows.release import audit_log
from tasks.errors import ArtifactError, ConfigError
from tasks.package import bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sample(tmp_path)[0]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two pairs of keys, as the error that asks for one says to make them."""
    home = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        private = home / f"{name}.pem"
        subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True)
        public = ["openssl", "ec", "-in", private, "-pubout", "-out", home / f"{name}.pub"]
        subprocess.run(public, check=True, capture_output=True)
    return {path.name: path for path in home.iterdir()}


def decision(folder: Path, action: str, **changes: str) -> dict:
    line = {"action": action, "version": "3", "by": "Ada", "at": "2026-11-28T04:00:00+00:00", "reason": "good"}
    assert {*line, "model", "bundle_digest"} >= audit_log.FIELDS  # as the record has them
    return line | {"bundle_digest": bundle.bundle_digest(folder)} | changes


def test_the_verdict_for_each_device_comes_first(folder: Path, tmp_path: Path) -> None:
    other = decision(folder, "approve", bundle_digest="0" * 64, version="2")
    lines = [other, decision(folder, "register", by="Bob"), decision(folder, "approve"), {"unreadable": 4}]
    values = certificate.issue(folder, tmp_path / "out", lines)
    assert [(each["name"], each["verdict"], each["variant"]) for each in values["devices"]] == [
        ("desktop", "pass", "q4_k_m"), ("phone", "pass", "q4_k_m"),
    ]  # fmt: skip
    assert values["bundle"] == bundle.bundle_digest(folder)
    assert values["version"] == "3"
    assert (values["decision"]["action"], values["decision"]["by"]) == ("approve", "Ada")
    assert set(values["variants"]) == {"q8_0", "q5_1", "q4_k_m", "q4_0", "onnx-int4"}
    html = (tmp_path / "out" / certificate.PAGE).read_text()
    assert html.index("Phone") < html.index("Evidence")
    assert HOSTILE not in html
    assert "src=" not in html
    assert "http" not in html


def test_what_was_not_measured_is_said(folder: Path, tmp_path: Path) -> None:
    said = certificate.issue(folder, tmp_path / "out", [])["not_measured"]
    assert any("avx2" in line and "2 cores, 8 GB" in line for line in said)  # not on the devices
    assert any("2 of its 4 threads" in line for line in said)
    assert any(
        "onnx-int4" in line for line in said
    )  # no bundle carries it, so nobody held its prompts against the model's


def test_nothing_decided_and_nothing_passed_is_a_certificate_too(tmp_path: Path) -> None:
    folder, _ = sample(tmp_path, chosen=None)
    values = certificate.issue(folder, tmp_path / "out", [])
    assert values["decision"] is values["version"] is None
    assert {each["variant"] for each in values["devices"]} == {None}
    assert {each["verdict"] for each in values["devices"]} <= {"pass", "undecided", "fail"}


def test_it_can_be_for_some_devices_alone(folder: Path, tmp_path: Path) -> None:
    values = certificate.issue(folder, tmp_path / "out", [], ["phone"])
    assert [each["name"] for each in values["devices"]] == ["phone"]
    assert all(set(variant["devices"]) == {"phone"} for variant in values["variants"].values())
    with pytest.raises(ConfigError, match=r"--profile tablet.*desktop, phone"):
        certificate.issue(folder, tmp_path / "out", [], ["tablet"])


@pytest.mark.parametrize("name", [certificate.NAME, certificate.PAGE, certificate.SIGNATURE])
def test_a_changed_byte_shows(folder: Path, tmp_path: Path, keys: dict[str, Path], name: str) -> None:
    out = tmp_path / "out"
    certificate.issue(folder, out, [], key=keys["ours.pem"])
    certificate.check(out, keys["ours.pub"], folder)
    whole = (out / name).read_bytes()
    for at in (len(whole) // 3, len(whole) // 2, len(whole) - 3):
        (out / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            certificate.check(out, keys["ours.pub"])
    (out / name).write_bytes(whole)
    certificate.check(out / certificate.PAGE, keys["ours.pub"])
    (out / name).unlink()
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        certificate.check(out, keys["ours.pub"])


def test_numbers_changed_with_their_digest_are_seen_by_the_signature(
    folder: Path, tmp_path: Path, keys: dict[str, Path]
) -> None:
    out = tmp_path / "out"
    values = certificate.issue(folder, out, [], key=keys["ours.pem"])
    del values["sha256"]
    values["devices"][0]["verdict"] = "fail"
    values["sha256"] = certificate._digest(values)
    (out / certificate.NAME).write_text(json.dumps(values))
    certificate.check(out)  # nobody asked whose it is
    with pytest.raises(ArtifactError, match=r"signature\.json"):
        certificate.check(out, keys["ours.pub"])


def test_a_signature_of_another_or_none_is_refused(folder: Path, tmp_path: Path, keys: dict[str, Path]) -> None:
    out = tmp_path / "out"
    certificate.issue(folder, out, [], key=keys["theirs.pem"])
    with pytest.raises(ArtifactError, match=r"signature\.json"):
        certificate.check(out, keys["ours.pub"])
    certificate.issue(folder, out, [])
    with pytest.raises(ArtifactError, match="not signed"):
        certificate.check(out, keys["ours.pub"])
    assert any("not signed" in line for line in certificate.check(out))


def test_a_key_that_is_none_is_told_before_anything_is_written(
    folder: Path, tmp_path: Path, keys: dict[str, Path]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "text.pem").write_text("no key")
    for key in (tmp_path / "text.pem", tmp_path / "missing.pem", keys["ours.pub"]):
        with pytest.raises(ConfigError, match="--key"):
            certificate.issue(folder, out, [], key=key)
        assert not out.exists()
    certificate.issue(folder, out, [], key=keys["ours.pem"])
    for key in (tmp_path / "text.pem", tmp_path / "missing.pem", keys["ours.pem"]):
        with pytest.raises(ConfigError, match="--key"):
            certificate.check(out, key)


def test_a_bundle_is_held_against_it(folder: Path, tmp_path: Path) -> None:
    certificate.issue(folder, tmp_path / "out", [])
    assert len(certificate.check(tmp_path / "out", folder=folder)) == 3
    other, _ = sample(tmp_path / "other", name="another")
    with pytest.raises(ArtifactError, match=bundle.bundle_digest(other)[:12]):
        certificate.check(tmp_path / "out", folder=other)
    (folder / "extra").write_text("x")
    with pytest.raises(ArtifactError, match="unexpected extra"):
        certificate.check(tmp_path / "out", folder=folder)


def test_it_takes_the_place_of_an_earlier_one_and_of_nothing_else(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    certificate.issue(folder, out, [])
    certificate.issue(folder, out, [], ["phone"])
    assert json.loads((out / certificate.NAME).read_text())["devices"][0]["name"] == "phone"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="--out"):
        certificate.issue(folder, out, [])
    assert (out / "notes.txt").read_text() == "mine"


def test_what_is_no_certificate_is_named(tmp_path: Path) -> None:
    for text in ("{", "[]", "{}", None):
        if text is not None:
            (tmp_path / certificate.NAME).write_text(text)
        with pytest.raises(ArtifactError, match=r"certificate\.json"):
            certificate.check(tmp_path)
        (tmp_path / certificate.NAME).unlink(missing_ok=True)


def test_a_bundle_of_a_version_without_devices_says_so(folder: Path, tmp_path: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    del report["devices"]
    (folder / "report.json").write_text(json.dumps(report))
    with pytest.raises(ArtifactError, match="slmops run"):
        certificate.issue(folder, tmp_path / "out", [])
