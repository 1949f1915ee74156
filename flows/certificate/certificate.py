"""A certificate on the disk: a folder with certificate.json, certificate.html and, where there is a key, signature.json.

certificate.json holds the sha256 of its own values and of the page, so that a changed byte shows. That alone says nothing of
who wrote it; a signature does. It is made by the OpenSSF's model-signing with a key of one's own, without any
server (https://github.com/sigstore/model-transparency).
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.certificate import page, signature
from flows.certificate.content import FORM, content
from tasks.errors import ArtifactError
from tasks.package import bundle

NAME, PAGE, SIGNATURE = "certificate.json", "certificate.html", "signature.json"


def model(folder: Path) -> str:
    """The name of the model in a bundle's folder.

    Raises:
        ArtifactError: there is no bundle.
    """
    return bundle.load(folder).name


def issue(
    folder: Path,
    out: Path,
    decisions: Sequence[Mapping[str, Any]],
    devices: Sequence[str] = (),
    key: Path | None = None,
) -> dict[str, Any]:
    """Write the certificate of the bundle in `folder` into the folder `out`, in the place of an earlier one, and return what
    it says.

    Raises:
        ArtifactError: the bundle is missing or damaged, or `out` holds something else than a certificate.
        ConfigError: it was not judged for one of `devices`, or the key is none.
    """
    values = content(folder, decisions, devices)
    _may_replace(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        html = page.render(values).encode()
        (partial / PAGE).write_bytes(html)
        values["page_sha256"] = hashlib.sha256(html).hexdigest()
        values["sha256"] = _digest(values)
        (partial / NAME).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if key:
            signature.sign(partial, partial / SIGNATURE, key)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return values


def check(place: Path, key: Path | None = None, folder: Path | None = None) -> list[str]:
    """Hold a certificate (its folder, or a file of it) against itself, its signature and the bundle in `folder`; what was
    found to hold, a line each.

    Raises:
        ArtifactError: there is none, something of it was changed, it is not signed by `key`, or is of another bundle.
        ConfigError: the key is none.
    """
    home = place if place.is_dir() else place.parent
    values = _read(home / NAME)
    if values.get("sha256") != _digest({name: value for name, value in values.items() if name != "sha256"}):
        raise ArtifactError(f"{home / NAME} was changed after it was issued: get it again from whoever issued it")
    try:
        html = (home / PAGE).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{home / PAGE}: {error.strerror}: get the certificate again, all of its folder") from None
    if hashlib.sha256(html).hexdigest() != values["page_sha256"]:
        raise ArtifactError(f"{home / PAGE} is not the page that was issued: get it again from whoever issued it")
    lines = [f"{values['model']}, bundle {values['bundle'][:12]}, issued {values['issued_at']}: nothing was changed"]
    lines.append(_signed(home, key))
    if folder:
        digest = bundle.bundle_digest(folder)
        if digest != values["bundle"]:
            raise ArtifactError(f"{folder} is bundle {digest[:12]}, and the certificate is of {values['bundle'][:12]}")
        bundle.verify(folder)
        lines.append(f"{folder} is that bundle, and every file of it is as listed")
    return lines


def _signed(home: Path, key: Path | None) -> str:
    there = (home / SIGNATURE).is_file()
    if key is None:
        return (
            "it is signed: --key PUBLIC_KEY tells whether by whom you think"
            if there
            else "it is not signed: anyone could have written it"
        )
    if not there:
        raise ArtifactError(f"{home / SIGNATURE} is missing: the certificate is not signed")
    signature.check(home, home / SIGNATURE, key)
    return f"signed by the owner of {key}"


def _may_replace(out: Path) -> None:
    if out.exists() and not (out.is_dir() and all(each.name in (NAME, PAGE, SIGNATURE) for each in out.iterdir())):
        raise ArtifactError(f"{out} holds other files than a certificate: name another folder with --out")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}: name a certificate's folder") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged ({error}): get it again from whoever issued it") from None
    if not isinstance(values, dict) or values.get("form") != FORM or not isinstance(values.get("bundle"), str):
        raise ArtifactError(f"{path} is no certificate of this version ({FORM})")
    return values


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
