"""Import and export of files of torch.save and SafeTensors, copied and in place, and what is refused."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import (
    ConfigurationError,
    FormatError,
    IntegrityError,
    ModelCheckpointError,
    StorageError,
    UnsupportedValueError,
)

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture
def manager(tracker: ExperimentTracker, tmp_path: Path) -> EnhancedCheckpointManager:
    return EnhancedCheckpointManager(tracker, tmp_path / "c")


def equal(left: Any, right: Any) -> bool:
    """Whether two states are the same, tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        same = isinstance(right, torch.Tensor) and (left.dtype, left.shape) == (right.dtype, right.shape)
        return same and left.reshape(-1).view(torch.uint8).equal(right.reshape(-1).view(torch.uint8))
    if isinstance(left, dict):
        return isinstance(right, dict) and [*left] == [*right] and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def trained() -> tuple[Any, Any, Any]:
    """A model with BatchNorm, its optimizer and scheduler after two steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def write_parts(path: Path) -> dict[str, Any]:
    model, optimizer, scheduler = trained()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 7,
        "global_step": 123,
        "loss": 0.25,
        "best_acc1": 61.5,
        "arch": "tiny",
    }
    torch.save(content, path)
    return content


def nothing_left(manager: EnhancedCheckpointManager, folder: Path) -> bool:
    """Whether no checkpoint is listed, published or staged."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name != ".engine"]
    return manager.list_checkpoints() == [] and files == []


@pytest.mark.parametrize("copy", [True, False])
def test_a_dict_of_parts_is_sorted_into_ours_and_nothing_is_lost(
    manager: EnhancedCheckpointManager, tmp_path: Path, copy: bool
) -> None:
    content = write_parts(tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    made = manager.import_checkpoint(tmp_path / "model.pt", copy=copy)
    loaded = manager.load_checkpoint(made)
    assert equal(loaded["model_state_dict"], content["model"])
    assert equal(loaded["optimizer_state_dict"], content["optimizer"])
    assert equal(loaded["scheduler_state_dict"], content["lr_scheduler"])
    assert loaded["extra_state"] == {"best_acc1": 61.5, "arch": "tiny"}
    assert (loaded["epoch"], loaded["step"], loaded["loss"]) == (7, 123, 0.25)
    manifest = json.loads((Path(manager.list_checkpoints()[0]["path"]) / "checkpoint.json").read_text())
    assert manifest["values"]["notes"] == "imported from model.pt"
    assert manager.verify_experiment_integrity()["failed"] == 0
    assert (tmp_path / "model.pt").read_bytes() == before
    model, optimizer, _ = trained()
    with torch.no_grad():
        model[0].weight.zero_()
    manager.load_into(model, optimizer, checkpoint_id=made)
    assert equal(dict(model.state_dict()), dict(content["model"]))


@pytest.mark.parametrize("copy", [True, False])
def test_a_bare_state_dict_is_the_model_and_ties_and_views_stay(
    manager: EnhancedCheckpointManager, tmp_path: Path, copy: bool
) -> None:
    flat = torch.arange(12.0)
    state = OrderedDict(a=flat[:4], b=flat[4:].view(2, 4), tied=flat[:4], other=torch.ones(3, dtype=torch.bfloat16))
    torch.save(state, tmp_path / "bare.pth")
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "bare.pth", copy=copy))["model_state_dict"]
    assert equal(dict(loaded), dict(state))
    loaded["a"][0] = 99
    assert loaded["tied"][0] == 99


def test_values_given_replace_those_of_the_file(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    write_parts(tmp_path / "model.pt")
    for copy in (True, False):
        manager.import_checkpoint(
            tmp_path / "model.pt",
            copy=copy,
            epoch=1,
            metrics={"accuracy": 0.5 + copy},
            checkpoint_type="adopted",
            config={"lr": 0.1},
            notes="the old one",
        )
        loaded = manager.load_checkpoint(checkpoint_type="adopted")
        assert (loaded["epoch"], loaded["step"], loaded["config"]) == (1, 123, {"lr": 0.1})
        assert manager.list_checkpoints()[-1]["notes"] == "the old one; imported from model.pt"
    assert manager.load_checkpoint(checkpoint_type="best:accuracy")["metrics"] == {"accuracy": 1.5}
    with pytest.raises(ConfigurationError, match="takes no 'optimizer'"):
        manager.import_checkpoint(tmp_path / "model.pt", optimizer=1)


def test_what_is_given_as_none_is_what_the_file_says(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    write_parts(tmp_path / "model.pt")
    nothing: dict[str, Any] = dict.fromkeys(("epoch", "step", "loss", "metrics", "checkpoint_type", "notes"))
    for copy in (True, False):
        loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "model.pt", copy=copy, **nothing))
        assert (loaded["epoch"], loaded["step"], loaded["loss"]) == (7, 123, 0.25)


def test_whole_floats_are_integers(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 3.0, "step": 1.5}, tmp_path / "m.pt")
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "m.pt"))
    assert (loaded["epoch"], loaded["step"], loaded["extra_state"]) == (3, 0, {"step": 1.5})


@pytest.mark.parametrize("copy", [True, False])
def test_what_is_exported_without_a_model_comes_in_without_one(
    manager: EnhancedCheckpointManager, tmp_path: Path, copy: bool
) -> None:
    saved = manager.save_checkpoint(None, {"lr": 1, "m": torch.ones(2)}, epoch=3, extra_state={"e": 1})
    path = manager.export_checkpoint(saved, tmp_path / "m.pt")
    loaded = manager.load_checkpoint(manager.import_checkpoint(path, copy=copy))
    assert (loaded["model_state_dict"], loaded["epoch"], loaded["extra_state"]) == (None, 3, {"e": 1})
    assert equal(loaded["optimizer_state_dict"], {"lr": 1, "m": torch.ones(2)})


@pytest.mark.parametrize("levels", [97, 99, 101, 103, 150, 3000])
def test_what_lies_too_deep_in_a_lightning_file_is_left_out(
    manager: EnhancedCheckpointManager, tmp_path: Path, levels: int
) -> None:
    content = {"state_dict": {"w": torch.ones(1)}, "pytorch-lightning_version": "2", "callbacks": "here", "a": 1}
    torch.save(content, tmp_path / "shallow.ckpt")
    with zipfile.ZipFile(tmp_path / "shallow.ckpt") as shallow, zipfile.ZipFile(tmp_path / "m.ckpt", "w") as archive:
        for name in shallow.namelist():
            text = shallow.read(name)
            if name.endswith("data.pkl"):  # torch.save itself cannot go so deep
                deep = b"}X\x01\x00\x00\x00k" * levels + b"}" + b"s" * levels
                before, _, after = text.partition(b"X\x04\x00\x00\x00here")
                text = before + deep + after
            archive.writestr(name, text)
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "m.ckpt"))
    assert loaded["extra_state"]["a"] == 1
    assert (".k.k.k" in manager.list_checkpoints()[0]["notes"]) is (levels >= 99)


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [(b"\x80\x02000.", "Unsupported operand 48"), (b"\x80\x02}", "EOFError"), (b"h\xff.", "KeyError")],
)
def test_of_a_damaged_pickle_the_reason_is_told_and_no_advice_to_trust_it(
    manager: EnhancedCheckpointManager, tmp_path: Path, pickled: bytes, reason: str
) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", content)
    with pytest.raises(FormatError, match=reason) as refused:
        manager.import_checkpoint(tmp_path / "m.pt")
    assert "weights_only" not in str(refused.value)


def test_what_only_looks_like_a_fact_is_kept_as_extra_state(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    content = {"state_dict": {"w": torch.ones(2)}, "epoch": "third", "metrics": [1], "step": None, "unknown": None}
    torch.save(content, tmp_path / "odd.pt")
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "odd.pt"))
    assert loaded["epoch"] == 0
    assert loaded["extra_state"] == {"epoch": "third", "metrics": [1], "unknown": None}


def test_in_place_is_one_file_with_two_names(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    safetensors_torch.save_file(
        {"w": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int8)}, tmp_path / "m.safetensors"
    )
    write_parts(tmp_path / "m.pt")
    for name in ("m.safetensors", "m.pt"):
        made = manager.import_checkpoint(tmp_path / name, copy=False)
        folder = Path(manager.list_checkpoints()[-1]["path"])
        assert [p for p in folder.iterdir() if p.samefile(tmp_path / name)], list(folder.iterdir())
        assert os.stat(tmp_path / name).st_nlink == 2
        manager.delete_checkpoint(made)
        manager.empty_trash()
        assert os.stat(tmp_path / name).st_nlink == 1


def test_a_linked_file_that_is_changed_in_place_is_found_by_its_digest(
    manager: EnhancedCheckpointManager, tmp_path: Path
) -> None:
    safetensors_torch.save_file({"w": torch.zeros(3 << 20)}, tmp_path / "m.safetensors")  # 12 MiB: three chunks
    made = manager.import_checkpoint(tmp_path / "m.safetensors", copy=False)
    assert equal(manager.load_checkpoint(made)["model_state_dict"], {"w": torch.zeros(3 << 20)})
    with open(tmp_path / "m.safetensors", "r+b") as file:
        file.seek(6 << 20)
        file.write(b"\xff")
    with pytest.raises(IntegrityError, match="SHA-256"):
        manager.load_checkpoint(made)


def test_in_place_works_with_compression_hooks_and_a_rebuilt_index(tracker: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(tracker, tmp_path / "c", enable_compression=True)
    safetensors_torch.save_file({"w": torch.arange(6.0)}, tmp_path / "m.safetensors")
    seen: list[str] = []
    manager.register_hook("see", lambda context: seen.append(context.event.value), ["before_checkpoint_save"])
    made = manager.import_checkpoint(tmp_path / "m.safetensors", copy=False)
    assert seen == ["before_checkpoint_save"]
    manager.rebuild_index()
    assert equal(manager.load_checkpoint(made)["model_state_dict"], {"w": torch.arange(6.0)})
    part = manager.load_checkpoint(made, keys="model.w")
    assert equal(part["model_state_dict"], {"w": torch.arange(6.0)})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "bool", "complex64"])
@pytest.mark.parametrize("copy", [True, False])
def test_safetensors_come_in_bit_for_bit(
    manager: EnhancedCheckpointManager, tmp_path: Path, dtype: str, copy: bool
) -> None:
    kind = getattr(torch, dtype)
    raw = torch.randint(0, 2, (96,), dtype=torch.uint8) if kind is torch.bool else torch.randint(0, 120, (96,)).byte()
    state = {"x": raw.view(kind).clone(), "scalar": torch.ones((), dtype=kind), "none": torch.empty(0, 3, dtype=kind)}
    safetensors_torch.save_file(state, tmp_path / "m.safetensors", {"format": "pt", "run": "7"})
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "m.safetensors", copy=copy))
    assert equal(dict(sorted(loaded["model_state_dict"].items())), dict(sorted(state.items())))
    assert loaded["config"] == {"run": "7"}


@pytest.mark.parametrize("metadata", [None, {"model": ""}], ids=["alone", "tied"])
def test_a_name_that_a_checkpoint_cannot_have_is_refused_in_place(
    manager: EnhancedCheckpointManager, tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    safetensors_torch.save_file({"": torch.ones(2), "b": torch.ones(1)}, tmp_path / "m.safetensors", metadata)
    with pytest.raises(ConfigurationError, match="copy=True"):
        manager.import_checkpoint(tmp_path / "m.safetensors", copy=False)
    assert nothing_left(manager, tmp_path / "c")
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "m.safetensors"))["model_state_dict"]
    assert equal(loaded[""], torch.ones(2))


def test_numpy_files_come_in_as_numpy_arrays(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    from safetensors.numpy import load_file, save_file

    save_file({"w": np.arange(3)}, tmp_path / "n.safetensors", {"format": "np"})
    made = manager.import_checkpoint(tmp_path / "n.safetensors")
    assert isinstance(manager.load_checkpoint(made)["model_state_dict"]["w"], np.ndarray)
    manager.export_checkpoint(made, tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors")["w"].tolist() == [0, 1, 2]


BARE = """
import sys
for name in ("torch", "numpy", "ml_dtypes", "jax", "safetensors"):
    sys.modules[name] = None
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import MissingDependencyError
with ExperimentTracker("bare") as tracker:
    manager = EnhancedCheckpointManager(tracker, "c")
    for copy in (True, False):
        loaded = manager.load_checkpoint(manager.import_checkpoint("f.safetensors", copy=copy))["model_state_dict"]
        assert loaded["w"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
        try:
            manager.import_checkpoint("h.safetensors", copy=copy)
        except MissingDependencyError as error:
            assert "bfloat16" in str(error)
"""


def test_safetensors_come_in_without_any_package_where_python_has_such_numbers(tmp_path: Path) -> None:
    safetensors_torch.save_file({"w": torch.arange(4.0).view(2, 2)}, tmp_path / "f.safetensors")
    safetensors_torch.save_file({"w": torch.ones(2).bfloat16()}, tmp_path / "h.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", BARE], cwd=tmp_path, env=environment, check=True, timeout=60)


class Settings:
    """Something that only a full pickle can bring."""

    def __init__(self) -> None:
        self.lr = 0.1


def test_pickles_that_need_more_are_refused_and_say_what_they_ask_for(
    manager: EnhancedCheckpointManager, tmp_path: Path
) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "args.pt")
    for copy in (True, False):
        with pytest.raises(ConfigurationError, match=r"argparse\.Namespace.*trust=True"):
            manager.import_checkpoint(tmp_path / "args.pt", copy=copy)
    assert nothing_left(manager, tmp_path / "c")
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "args.pt", trust=True))
    assert loaded["extra_state"] == {"args": {"lr": 0.1}}
    torch.save({"model": {"w": torch.ones(2)}, "deep": [Settings()]}, tmp_path / "odd.pt")
    with pytest.raises(UnsupportedValueError, match=r"deep\[0\].*Settings"):
        manager.import_checkpoint(tmp_path / "odd.pt", trust=True)
    with pytest.raises(ConfigurationError, match="copy=True"):
        manager.import_checkpoint(tmp_path / "odd.pt", trust=True, copy=False)


def test_a_whole_module_that_is_trusted_becomes_its_state(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    model, _, _ = trained()
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(ConfigurationError, match="Sequential"):
        manager.import_checkpoint(tmp_path / "whole.pt")
    made = manager.import_checkpoint(tmp_path / "whole.pt", trust=True)
    assert equal(manager.load_checkpoint(made)["model_state_dict"], model.state_dict())


def test_the_form_before_torch_1_6_comes_in_as_a_copy_only(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    torch.save({"w": torch.arange(5)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    made = manager.import_checkpoint(tmp_path / "old.pth")
    assert equal(manager.load_checkpoint(made)["model_state_dict"], {"w": torch.arange(5)})
    with pytest.raises(ConfigurationError, match="copy=True"):
        manager.import_checkpoint(tmp_path / "old.pth", copy=False)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def lie(path: Path) -> None:
    """Say of a storage of 8 elements that it has 200."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if name.endswith("data.pkl"):
                assert b"K\x08tq" in content
                content = content.replace(b"K\x08tq", b"K\xc8tq", 1).replace(b"K\x00K\x08\x85", b"K\x00K\xc8\x85", 1)
            archive.writestr(name, content)


def expand(path: Path) -> None:
    """Tell of 4 GiB, of which there are 4 bytes."""
    torch.save({"w": torch.zeros(1).expand(2**30)}, path)


def expand_beyond_memory(path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(2**42)}, path)


def share(path: Path) -> None:
    """Tell of ten million values, of which there are 70."""
    values: Any = [1]
    for _ in range(7):
        values = [values] * 10
    torch.save({"model": {"w": torch.ones(1)}, "x": values}, path)


def hold_itself(path: Path) -> None:
    content: dict[str, Any] = {"state_dict": {"w": torch.ones(1)}, "pytorch-lightning_version": "2"}
    content["callbacks"] = {"all": content}
    torch.save(content, path)


def code(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path.parent / "owned"),)

    torch.save({"w": torch.ones(1), "x": Evil()}, path)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("harm", [cut, bomb, lie, code, expand, expand_beyond_memory, share, hold_itself])
def test_hostile_torch_files_are_refused_and_leave_nothing(
    manager: EnhancedCheckpointManager, tmp_path: Path, harm: Callable[[Path], None], copy: bool
) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.arange(8.0)}, path)
    harm(path)
    with pytest.raises((FormatError, ConfigurationError)):
        manager.import_checkpoint(path, copy=copy)
    assert nothing_left(manager, tmp_path / "c")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        b"\xff" * 7 + b"\x7f{",
        b"\x02" + bytes(7) + b"{}x",
        b"\x40" + bytes(7) + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(64) + bytes(8),
        pickle.dumps({"w": 1}),
    ],
    ids=["empty", "short", "length", "trailing", "shape", "pickle"],
)
def test_hostile_safetensors_are_refused_and_leave_nothing(
    manager: EnhancedCheckpointManager, tmp_path: Path, content: bytes, copy: bool
) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(FormatError):
        manager.import_checkpoint(tmp_path / "m.safetensors", copy=copy)
    assert nothing_left(manager, tmp_path / "c")
    assert (tmp_path / "m.safetensors").read_bytes() == content


def test_what_is_no_checkpoint_is_refused(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in ("missing.pt", "pipe", "folder", "folder/x"):
        with pytest.raises(ConfigurationError):
            manager.import_checkpoint(tmp_path / path)
    for wrong in (None, 3, "", "a\0b"):
        with pytest.raises(ConfigurationError):
            manager.import_checkpoint(wrong)  # type: ignore[arg-type]


def test_in_place_across_file_systems_says_to_copy(
    manager: EnhancedCheckpointManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors_torch.save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ConfigurationError, match="copy=True"):
        manager.import_checkpoint(tmp_path / "m.safetensors", copy=False)
    assert nothing_left(manager, tmp_path / "c")


def test_a_file_that_changes_during_the_import_is_refused(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors_torch.save_file({"w": torch.ones(2)}, path)

    def change(context: object) -> None:
        with open(path, "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x00")
        os.utime(path, (1, 1))

    manager.register_hook("change", change, ["before_checkpoint_save"])
    with pytest.raises(FormatError, match="changed while"):
        manager.import_checkpoint(path, copy=False)
    assert nothing_left(manager, tmp_path / "c")


class Tied(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("name", ["m.safetensors", "folder", "m.pt"])
@pytest.mark.parametrize("backend", ["safetensors", "pytorch"])
def test_export_then_import_gives_the_same_bits(
    tracker: ExperimentTracker, tmp_path: Path, name: str, backend: str
) -> None:
    manager = EnhancedCheckpointManager(tracker, tmp_path / "c", backend)
    model = Tied()
    state = dict(model.state_dict()) | {"half": torch.randn(5).bfloat16(), "view": torch.randn(4, 4).T}
    saved = manager.save_checkpoint(state, epoch=3, config={"a": 1})
    path = manager.export_checkpoint(saved, tmp_path / name)
    assert path == str(tmp_path / name)
    for copy in (True, False):
        loaded = manager.load_checkpoint(manager.import_checkpoint(path, copy=copy))
        found = loaded["model_state_dict"]
        assert equal({key: found[key] for key in state}, state)
        assert found["embed.weight"] is found["head.weight"]
        assert loaded["config"] == (None if name == "m.safetensors" else {"a": 1})


def test_exported_safetensors_load_with_the_package_itself(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    model = Tied()
    saved = manager.save_checkpoint(model)
    manager.export_checkpoint(saved, tmp_path / "m.safetensors")
    manager.export_checkpoint(saved, tmp_path / "folder")
    for path in (tmp_path / "m.safetensors", tmp_path / "folder" / "model.safetensors"):
        other = Tied()
        assert safetensors_torch.load_model(other, path) == (set(), [])
        assert equal(other.state_dict(), model.state_dict())
        assert equal(safetensors_torch.load_file(path), {"embed.weight": model.embed.weight.detach()})
    assert (tmp_path / "folder" / "config.json").exists() is False


def test_everything_is_in_an_exported_pt_file(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    model, optimizer, scheduler = trained()
    extra = {"seen": frozenset([1, 2]), "large": 2**3000, "order": (1, 2), "rng": torch.get_rng_state()}
    values: dict[str, Any] = {"loss": 0.5, "val_loss": float("inf"), "metrics": {"f1": 0.25}, "config": {"lr": [0.1]}}
    saved = manager.save_checkpoint(model, optimizer, scheduler, 4, 44, extra_state=extra, **values)
    manager.export_checkpoint(saved, tmp_path / "all.pt")
    content = torch.load(tmp_path / "all.pt", weights_only=True)
    assert {"model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "epoch", "step"} <= content.keys()
    model.load_state_dict(content["model_state_dict"])
    optimizer.load_state_dict(content["optimizer_state_dict"])
    scheduler.load_state_dict(content["scheduler_state_dict"])
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "all.pt"))
    original = manager.load_checkpoint(saved)
    for part in ("model", "optimizer", "scheduler"):
        assert equal(loaded[f"{part}_state_dict"], original[f"{part}_state_dict"])
    for name in ("epoch", "step", "loss", "val_loss", "metrics", "config"):
        assert loaded[name] == original[name]
    assert loaded["extra_state"]["order"] == (1, 2)
    assert loaded["extra_state"]["rng"].equal(extra["rng"])
    manager.export_checkpoint(manager.save_checkpoint({"w": torch.ones(1)}, extra_state=[1]), tmp_path / "list.pt")
    assert manager.load_checkpoint(manager.import_checkpoint(tmp_path / "list.pt"))["extra_state"] == [1]


@pytest.mark.parametrize("copy", [True, False])
def test_a_file_of_our_own_pytorch_backend_comes_in_as_what_was_saved(
    tracker: ExperimentTracker, tmp_path: Path, copy: bool
) -> None:
    manager = EnhancedCheckpointManager(tracker, tmp_path / "c", "pytorch")
    model, optimizer, _ = trained()
    saved = manager.save_checkpoint(model, optimizer, extra_state={"seen": [1]})
    file = Path(manager.list_checkpoints()[0]["path"]) / "checkpoint.pt"
    loaded = manager.load_checkpoint(manager.import_checkpoint(file, copy=copy))
    original = manager.load_checkpoint(saved)
    for part in ("model_state_dict", "optimizer_state_dict", "extra_state"):
        assert equal(loaded[part], original[part])


def test_large_folders_are_sharded_with_an_index(
    manager: EnhancedCheckpointManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_checkpoint.checkpoint.foreign import huggingface

    monkeypatch.setattr(huggingface, "_SHARD", 100)
    state = {f"layer.{i}": torch.full((20,), float(i)) for i in range(4)}
    path = Path(manager.export_checkpoint(manager.save_checkpoint(state), tmp_path / "folder"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 320
    held = {key: file.name for file in path.glob("*.safetensors") for key in safetensors_torch.load_file(file)}
    assert held == index["weight_map"]
    assert len(set(held.values())) == 4
    for copy in (True, False):
        made = manager.import_checkpoint(path, copy=copy)
        assert equal(dict(sorted(manager.load_checkpoint(made)["model_state_dict"].items())), state)
    listed = Path(manager.list_checkpoints()[-1]["path"])
    assert sum(file.stat().st_nlink == 2 for file in listed.glob("model-*.safetensors")) == 4


def shard_folder(path: Path) -> None:
    path.mkdir()
    weight_map = {}
    for i in (1, 2):
        name = f"model-{i:05}-of-00002.safetensors"
        safetensors_torch.save_file({f"w{i}": torch.ones(2)}, path / name, {"format": "pt"})
        weight_map[f"w{i}"] = name
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def point(name: str) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        index = {"weight_map": {"w1": "model-00001-of-00002.safetensors", "w2": name}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    return harm


def lose_shard(path: Path) -> None:
    (path / "model-00002-of-00002.safetensors").unlink()


def link_out(path: Path) -> None:
    (path / "model-00002-of-00002.safetensors").rename(path.parent / "secret")
    (path / "model-00002-of-00002.safetensors").symlink_to(path.parent / "secret")


def swap(path: Path) -> None:
    index = {"weight_map": {f"w{i}": f"model-0000{3 - i}-of-00002.safetensors" for i in (1, 2)}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def no_json(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text("[" * 100_000)


def bad_config(path: Path) -> None:
    (path / "config.json").write_text("{")


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(
    "harm",
    [point("../x.safetensors"), point("/etc/passwd"), point(".."), lose_shard, link_out, swap, no_json, bad_config],
)
def test_hostile_folders_are_refused_and_leave_nothing(
    manager: EnhancedCheckpointManager, tmp_path: Path, harm: Callable[[Path], None], copy: bool
) -> None:
    shard_folder(tmp_path / "hf")
    safetensors_torch.save_file({"w2": torch.ones(2)}, tmp_path / "x.safetensors")
    harm(tmp_path / "hf")
    with pytest.raises(FormatError):
        manager.import_checkpoint(tmp_path / "hf", copy=copy)
    assert nothing_left(manager, tmp_path / "c")


def test_of_several_forms_of_one_model_the_safe_one_is_taken_and_the_other_named(
    manager: EnhancedCheckpointManager, tmp_path: Path
) -> None:
    shard_folder(tmp_path / "hf")
    torch.save({"w": torch.zeros(2)}, tmp_path / "hf" / "pytorch_model.bin")
    loaded = manager.load_checkpoint(manager.import_checkpoint(tmp_path / "hf"))
    assert sorted(loaded["model_state_dict"]) == ["w1", "w2"]
    assert manager.list_checkpoints()[0]["notes"] == "imported from hf; left out: pytorch_model.bin"


@pytest.mark.parametrize("copy", [True, False])
def test_the_links_of_hugging_faces_cache_are_followed(
    manager: EnhancedCheckpointManager, tmp_path: Path, copy: bool
) -> None:
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    safetensors_torch.save_file({"w": torch.ones(2)}, blobs / "123", {"format": "pt"})
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    made = manager.import_checkpoint(snapshot, copy=copy)
    assert equal(manager.load_checkpoint(made)["model_state_dict"], {"w": torch.ones(2)})


def test_what_is_there_is_replaced_only_when_told_and_only_by_what_is_whole(
    manager: EnhancedCheckpointManager, tmp_path: Path
) -> None:
    saved = manager.save_checkpoint({"w": torch.ones(2)})
    target = tmp_path / "m.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(ConfigurationError, match="overwrite=True"):
        manager.export_checkpoint(saved, target)
    with open(Path(manager.list_checkpoints()[-1]["path"]) / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    with pytest.raises(IntegrityError):
        manager.export_checkpoint(saved, target, overwrite=True)
    assert target.read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    sound = manager.save_checkpoint({"w": torch.ones(2)})
    manager.export_checkpoint(sound, target, overwrite=True)
    assert equal(safetensors_torch.load_file(target), {"w": torch.ones(2)})
    manager.export_checkpoint(sound, tmp_path / "folder")
    manager.export_checkpoint(sound, tmp_path / "folder", overwrite=True)
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"notes\.txt"):
        manager.export_checkpoint(sound, tmp_path / "folder", overwrite=True)
    assert (tmp_path / "folder" / "notes.txt").read_text() == "mine"


def test_exports_that_cannot_be_are_refused(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    saved = manager.save_checkpoint({"z": torch.ones(2, dtype=torch.complex128), "n": 1})
    with pytest.raises(UnsupportedValueError, match="complex128"):
        manager.export_checkpoint(saved, tmp_path / "m.safetensors")
    with pytest.raises(ConfigurationError, match="no tensors"):
        manager.export_checkpoint(manager.save_checkpoint({"n": 1}), tmp_path / "m.safetensors")
    twice = manager.save_checkpoint({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}})
    with pytest.raises(UnsupportedValueError, match="by this name"):
        manager.export_checkpoint(twice, tmp_path / "m.safetensors")
    with pytest.raises(ConfigurationError, match=r"\.onnx"):
        manager.export_checkpoint(saved, tmp_path / "m.onnx")
    with pytest.raises(ModelCheckpointError, match="no such folder"):
        manager.export_checkpoint(saved, tmp_path / "no" / "m.pt")
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith("experiments.db")] == ["c"]


def test_the_engines_own_files_are_no_place_for_an_export(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    saved = manager.save_checkpoint({"w": torch.ones(2)})
    folder = Path(manager.list_checkpoints()[0]["path"])
    (tmp_path / "link").symlink_to(folder)
    database = Path(manager._db.place)
    for target in (folder / "model.safetensors", folder / "new.pt", folder, tmp_path / "link" / "new.pt", database):
        for overwrite in (True, False):
            with pytest.raises(ConfigurationError, match="engine's own"):
                manager.export_checkpoint(saved, target, overwrite=overwrite, format="pt")
    assert manager.verify_experiment_integrity()["failed"] == 0
    manager.export_checkpoint(saved, f"{database}.pt")


OLD = """
import os, signal, sys
from model_checkpoint import EnhancedCheckpointManager
manager = EnhancedCheckpointManager(None, sys.argv[1], database_url=sys.argv[2])
rename = os.rename
def then_die(*arguments):
    rename(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
os.rename = then_die
manager.export_checkpoint(sys.argv[3], sys.argv[4], overwrite=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders can be exchanged at once on Linux only")
def test_a_folder_is_replaced_at_once(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    ids = [manager.save_checkpoint({"w": torch.full((2,), float(n))}) for n in range(2)]
    manager.export_checkpoint(ids[0], tmp_path / "folder")
    subprocess.run(
        [sys.executable, "-c", OLD, str(tmp_path / "c"), manager._db.database_url, ids[1], str(tmp_path / "folder")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=60,
    )
    assert equal(safetensors_torch.load_file(tmp_path / "folder" / "model.safetensors"), {"w": torch.ones(2)})
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("at_once", [True, False])
def test_a_replaced_folder_that_cannot_be_removed_is_told_of(
    manager: EnhancedCheckpointManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    at_once: bool,
) -> None:
    from model_checkpoint.checkpoint.foreign import target

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    ids = [manager.save_checkpoint({"w": torch.full((2,), float(n))}) for n in range(2)]
    manager.export_checkpoint(ids[0], tmp_path / "folder")
    monkeypatch.setattr(target, "remove_folder", refuse)
    if not at_once:
        monkeypatch.setattr(target, "exchange", lambda *_: False)
    manager.export_checkpoint(ids[1], tmp_path / "folder", overwrite=True)
    (left,) = [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert str(left) in caplog.text
    for folder, number in ((left, 0.0), (tmp_path / "folder", 1.0)):
        assert equal(safetensors_torch.load_file(folder / "model.safetensors"), {"w": torch.full((2,), number)})


def test_names_may_be_as_long_as_the_file_system_takes(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    saved = manager.save_checkpoint({"w": torch.ones(2)})
    assert os.path.exists(manager.export_checkpoint(saved, tmp_path / f"{'n' * 250}.pt"))
    with pytest.raises(StorageError, match="the checkpoint itself is untouched"):
        manager.export_checkpoint(saved, tmp_path / f"{'n' * 260}.pt")


def test_a_full_disk_is_told_of_as_that_of_the_export(
    manager: EnhancedCheckpointManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saved = manager.save_checkpoint({"w": torch.ones(2)})
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="export a checkpoint: No space") as refused:
        manager.export_checkpoint(saved, tmp_path / "m.pt")
    assert "max_checkpoints" not in str(refused.value)
    assert refused.value.filename == str(tmp_path / "m.pt")


def test_folders_that_may_not_be_read_are_told_of(
    manager: EnhancedCheckpointManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = manager.save_checkpoint({"w": torch.ones(2)})
    manager.export_checkpoint(saved, tmp_path / "folder")
    (tmp_path / "closed").mkdir()

    def refuse(path: str = ".") -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patch:  # root may read everything
        patch.setattr(os, "listdir", refuse)
        patch.setattr(os, "access", lambda path, mode: path != str(tmp_path / "closed"))
        for name in ("folder", "closed"):
            with pytest.raises(StorageError, match=f"import: Permission denied.*{name}"):
                manager.import_checkpoint(tmp_path / name)
        with pytest.raises(StorageError, match="export a checkpoint: Permission denied"):
            manager.export_checkpoint(saved, tmp_path / "folder", overwrite=True)


def test_names_that_are_no_text_are_refused_or_noted(manager: EnhancedCheckpointManager, tmp_path: Path) -> None:
    saved = manager.save_checkpoint({"w": torch.ones(2)})
    for call in (manager.import_checkpoint, lambda path: manager.export_checkpoint(saved, path, format="pt")):
        with pytest.raises(ConfigurationError, match="must be the path"):
            call(str(tmp_path / "x\ud800"))
    shard_folder(tmp_path / "hf")
    with pytest.raises(UnsupportedValueError, match="notes"):
        manager.import_checkpoint(tmp_path / "hf", notes=5)
    point("\ud800.safetensors")(tmp_path / "hf")
    with pytest.raises(FormatError, match="cannot be one"):
        manager.import_checkpoint(tmp_path / "hf")
    manager.export_checkpoint(saved, tmp_path / "folder")
    Path(os.fsdecode(os.fsencode(tmp_path / "folder") + b"/\xff.bin")).write_bytes(b"x")
    manager.import_checkpoint(tmp_path / "folder")
    assert manager.list_checkpoints()[-1]["notes"] == "imported from folder; left out: \\udcff.bin"


@pytest.mark.parametrize("config", ['{"a": "\\u0000"}', "[" * 200 + "]" * 200], ids=["nul", "deep"])
def test_a_config_that_cannot_be_kept_can_be_replaced(
    manager: EnhancedCheckpointManager, tmp_path: Path, config: str
) -> None:
    shard_folder(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(config)
    for copy in (True, False):
        with pytest.raises(FormatError, match="config="):
            manager.import_checkpoint(tmp_path / "hf", copy=copy)
        made = manager.import_checkpoint(tmp_path / "hf", config={"b": 1}, copy=copy)
        assert manager.load_checkpoint(made)["config"] == {"b": 1}


def test_a_checkpoint_of_the_engines_own_is_told_apart_from_a_folder_of_hugging_face(
    manager: EnhancedCheckpointManager,
) -> None:
    manager.save_checkpoint({"w": torch.ones(2)}, step=3)
    with pytest.raises(ConfigurationError, match="is a checkpoint of this engine; open the directory"):
        manager.import_checkpoint(manager.list_checkpoints()[0]["path"])
