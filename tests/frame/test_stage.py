"""Running a stage: inputs verified, all or nothing, one at a time, resumable scratch."""

import copy
import errno
import fcntl
import itertools
import json
import os
from pathlib import Path

import pytest
from checkout import DEFAULTS

from tasks import params
from tasks.errors import ArtifactError, ConfigError, DiskFullError, StageError
from tasks.frame import manifest, stage
from tasks.frame.stage import Stage


def write(_: object, *, out: Path) -> dict[str, float]:
    (out / "deep").mkdir()
    (out / "deep" / "a.txt").write_text("a")
    (out / "time.json").write_text("1")
    return {"n": 1.0}


def read(_: object, *, first: Path, out: Path) -> dict[str, float]:
    (out / "b.txt").write_text((first / "deep" / "a.txt").read_text())
    return {}


ROWS = {
    row.name: row
    for row in (
        Stage("acquire", write, ("acquire",), measured=("time.json",)),
        Stage("finetune", read, ("finetune",), {"first": "acquire"}),
    )
}
VALUES = params.load(DEFAULTS)


def run(root: Path, name: str, rows: dict[str, Stage] = ROWS) -> manifest.Manifest:
    return stage.run(rows[name], rows, VALUES, root)


def test_equal_work_gives_equal_bytes_and_measured_files_do_not_count(tmp_path: Path) -> None:
    run(tmp_path / "one", "acquire")
    run(tmp_path / "two", "acquire")
    (tmp_path / "two/build/acquire/time.json").write_text("2")
    one, two = (tmp_path / n / "build/acquire" for n in ("one", "two"))
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()
    assert list(manifest.verify(two).files) == ["deep/a.txt"]


def test_a_missing_changed_or_extra_input_file_is_told_with_all_the_others(tmp_path: Path) -> None:
    run(tmp_path, "acquire")
    folder = tmp_path / "build/acquire"
    (folder / "deep/a.txt").write_text("other")
    (folder / "extra.txt").write_text("")
    (folder / "time.json").unlink()
    with pytest.raises(ArtifactError) as caught:
        run(tmp_path, "finetune")
    assert all(
        text in str(caught.value) for text in ("changed deep/a.txt", "unexpected extra.txt", "missing time.json")
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": 3}', '{"stage": "acquire", "surprise": 1}'])
def test_a_corrupted_manifest_names_the_file_and_the_way_out(tmp_path: Path, text: str) -> None:
    run(tmp_path, "acquire")
    (tmp_path / "build/acquire/manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"build/acquire/manifest\.json is damaged"):
        run(tmp_path, "finetune")


def test_a_missing_input_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"build/acquire/manifest\.json .*`dvc pull`"):
        run(tmp_path, "finetune")


def test_a_failed_stage_keeps_the_old_output_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    run(tmp_path, "acquire")
    before = manifest.digest(tmp_path / "build/acquire")

    def fail(_: object, *, out: Path) -> dict[str, float]:
        (out / "half.bin").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    rows = {"acquire": Stage("acquire", fail, ("acquire",))}
    with pytest.raises(DiskFullError, match="build/acquire"):
        run(tmp_path, "acquire", rows)
    assert manifest.digest(tmp_path / "build/acquire") == before
    assert not list((tmp_path / "build").glob(".*.partial"))


def test_the_same_stage_twice_at_once_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "build/.acquire.lock"
    lock.parent.mkdir()
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(StageError, match=f"acquire .*{tmp_path}"):
            run(tmp_path, "acquire")
    run(tmp_path, "acquire")


def test_scratch_survives_a_failure_and_is_dropped_when_params_or_inputs_change(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def resume(_: object, *, out: Path, scratch: Path) -> dict[str, float]:
        seen.append(sorted(p.name for p in scratch.iterdir() if p.name != "key"))
        (scratch / "checkpoint").write_text("1")
        raise StageError("killed")

    rows = {"acquire": Stage("acquire", resume, ("acquire",), scratch=True)}
    other = {"acquire": Stage("acquire", resume, ("distill",), scratch=True)}
    for table in (rows, rows, other):
        with pytest.raises(StageError, match="killed"):
            run(tmp_path, "acquire", table)
    assert seen == [[], ["checkpoint"], []]


def test_a_variant_stage_needs_a_known_variant(tmp_path: Path) -> None:
    rows = {"quantize": Stage("quantize", write, ("quantize",), per=("variant",))}
    for words in ((), ("q9_9",), ("q8_0", "17")):
        with pytest.raises(ConfigError, match="q8_0"):
            stage.run(rows["quantize"], rows, VALUES, tmp_path, *words)


def test_items_of_two_axes_meet_those_of_one(tmp_path: Path) -> None:
    """A stage for each of a variant and a seed reads what was made for its variant, and feeds the stage for each variant."""
    seen: dict[tuple[object, ...], list[str]] = {}

    def note(_: object, *, out: Path, variant: str = "", seed: int = 0, made: Path | None = None) -> dict[str, float]:
        seen[variant, seed] = sorted(path.name for path in made.iterdir()) if made else []
        return write(_, out=out)

    rows = {
        each.name: each
        for each in (
            Stage("quantize", note, ("quantize",), per=("variant",)),
            Stage("measure", note, ("quantize",), {"made": "quantize"}, per=("variant", "seed")),
            Stage("judge", note, ("quantize",), {"made": "measure"}, per=("variant",)),
            Stage("package", note, ("quantize",), {"made": "measure"}),
        )
    }
    variants, seeds = VALUES.quantize.variants, VALUES.select.seeds
    for row in rows.values():
        for item in row.items(VALUES):
            there = copy.copy(item)  # by __reduce_ex__, as to another process
            assert (there, hash(there)) == (item, hash(item))
            made = stage.run(row, rows, VALUES, tmp_path, *item.words)
    assert set(seen) == {("", 0), *((variant, 0) for variant in variants), *itertools.product(variants, seeds)}
    assert set(made.inputs) == {f"made/{variant}/{seed}" for variant in variants for seed in seeds}
    judged = manifest.load(stage.folder(tmp_path, "judge", variants[0]))
    assert set(judged.inputs) == {f"made/{seed}" for seed in seeds}
    measured = manifest.load(stage.folder(tmp_path, "measure", variants[0], str(seeds[0])))
    assert measured.inputs == {"made": manifest.digest(stage.folder(tmp_path, "quantize", variants[0]))}
    with pytest.raises(ConfigError, match=f"{variants[0]} {seeds[0]}"):
        stage.run(rows["measure"], rows, VALUES, tmp_path, variants[0])


def test_a_full_disk_is_foreseen(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=f"{10**12} MB"):
        stage.need_space(tmp_path / "not/there/yet", 10**18)


def test_manifest_is_plain_sorted_json(tmp_path: Path) -> None:
    run(tmp_path, "acquire")
    raw = json.loads((tmp_path / "build/acquire/manifest.json").read_text())
    assert list(raw) == sorted(raw)
    assert raw["stage"] == "acquire"


def test_what_was_verified_is_not_hashed_again_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    manifest.write(folder, stage="x", params="p", inputs={}, measured=(), metrics={})
    hashed: list[str] = []
    real = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: (hashed.append(path.name), real(path))[1])
    manifest.verify(folder)
    manifest.verify(folder)  # too fresh to be trusted
    assert hashed.count("a.txt") == 2
    old = 1_000_000_000
    os.utime(folder / "a.txt", (old, old))
    manifest.verify(folder)
    manifest.verify(folder)
    assert hashed.count("a.txt") == 3
    (folder / "a.txt").write_text("b")
    with pytest.raises(ArtifactError, match="changed a"):
        manifest.verify(folder)
    os.utime(folder / "a.txt", (old, old))  # of the same size and age, but another file's
    (folder / "b.txt").write_text("b")
    (folder / "b.txt").replace(folder / "a.txt")
    os.utime(folder / "a.txt", (old, old))
    with pytest.raises(ArtifactError, match="changed a"):
        manifest.verify(folder)
