"""A prefix cache on disk that this user cannot have is told with all other findings, before weights are read."""

import os

import pytest

from executor.errors import UserError
from executor.recipe import unused
from executor.recipe.disk_cache import KEY, root_findings, without_disk_cache
from executor.recipe.schema import Recipe, build_recipe
from executor.recipe.settle import prepare
from tests.reference import REPO

TINY = REPO / "models/tiny/qwen3_vl"


def recipe_of(path: object, **parallel: int) -> Recipe:
    sections = {"scheduler_config": {"prefix_cache_path": str(path)}, "parallel_config": parallel}
    return build_recipe({"model_config": {"model_path": str(TINY), "device": "cpu"}, **sections})


def test_entries_of_another_user_are_told_beside_other_findings(tmp_path, monkeypatch):
    (tmp_path / "prefix-0a1b").mkdir()
    prepare(recipe_of(tmp_path))
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    with pytest.raises(UserError) as refused:
        prepare(recipe_of(tmp_path, moe_ep_size=2))
    assert f"{KEY}: {tmp_path} cannot be written to (prefix-0a1b in it is a folder of another user)" in str(
        refused.value
    )
    assert "moe_ep_size" in str(refused.value)


def test_a_folder_that_this_user_may_not_write_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, rights: path != tmp_path)  # a superuser may write everywhere
    for path in (tmp_path, tmp_path / "not" / "there"):
        with pytest.raises(
            UserError, match=f"{KEY}: {path} cannot be written to .this user may not write to {tmp_path}"
        ):
            prepare(recipe_of(path))


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"{tmp_path / 'file'} is no folder" in root_findings(str(path))[0]


def test_nothing_is_made_and_what_is_no_entry_is_nobodys_business(tmp_path, monkeypatch):
    assert root_findings(str(tmp_path / "new" / "folder")) == [] and not list(tmp_path.iterdir())
    another = os.geteuid() + 1
    (tmp_path / "other").mkdir()
    (tmp_path / "prefix-0a1b").symlink_to(tmp_path / "other")
    monkeypatch.setattr(os, "geteuid", lambda: another)
    assert root_findings(str(tmp_path)) == [] and root_findings(None) == []


@pytest.mark.parametrize("name", ["checkpoints.json", "checkpoints.lock", "trim.lock"])
def test_files_of_the_cache_are_regular_and_this_users(tmp_path, monkeypatch, name):
    file = tmp_path / name
    for made, words in (
        (os.mkfifo, "is no regular file"),
        (os.mkdir, "is no regular file"),
        (lambda path: os.symlink("elsewhere", path), "is a link"),
    ):
        made(file)
        with pytest.raises(UserError, match=f"{KEY}: {tmp_path} cannot be written to .{name} in it {words}"):
            prepare(recipe_of(tmp_path))
        file.rmdir() if words.endswith("file") and file.is_dir() else file.unlink()
    file.touch()
    assert root_findings(str(tmp_path)) == []
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    assert f"{name} in it is a file of another user" in root_findings(str(tmp_path))[0]


def test_a_bound_without_a_folder_is_told_once(tmp_path, caplog):
    unused._warn.cache_clear()
    model = {"model_path": str(TINY), "device": "cpu"}
    named = build_recipe(
        {"model_config": model, "scheduler_config": {"prefix_cache_path": str(tmp_path), "prefix_cache_gb": 3}}
    )
    prepare(named)
    prepare(without_disk_cache(named))
    assert "prefix_cache_gb" not in caplog.text
    alone = build_recipe({"model_config": model, "scheduler_config": {"prefix_cache_gb": 3}})
    prepare(prepare(alone).recipe)
    told = [record.message for record in caplog.records if "prefix_cache_gb" in record.message]
    assert len(told) == 1 and "which has no effect without prefix_cache_path" in told[0]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_bound_is_finite(value):
    with pytest.raises(UserError, match=r"prefix_cache_gb: got (inf|nan) .*allowed: a number, more than 0, finite"):
        build_recipe({"model_config": {"model_path": str(TINY)}, "scheduler_config": {"prefix_cache_gb": value}})
