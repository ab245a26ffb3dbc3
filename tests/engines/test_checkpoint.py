"""Checkpoints are whole, and what is none is refused in one line."""

import pytest
import torch

from medseg.engines import load_checkpoint, save_checkpoint
from medseg.errors import CheckpointError


def network(seed=0, width=3):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(1, width, 3), torch.nn.BatchNorm2d(width))


def test_weights_and_values_come_back(tmp_path):
    saved, other = network(1), network(2)
    save_checkpoint(tmp_path / "a.pt", {"model": saved}, iteration=7, score=0.5)
    content = load_checkpoint(tmp_path / "a.pt", other)
    assert (content["iteration"], content["score"]) == (7, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_bare_state_dict_is_taken(tmp_path):
    torch.save(network(1).state_dict(), tmp_path / "a.pt")
    other = network(2)
    load_checkpoint(tmp_path / "a.pt", other)
    assert torch.equal(other[0].weight, network(1)[0].weight)


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def bad_files(folder):
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "empty.pt").write_bytes(b"")
    save_checkpoint(folder / "whole.pt", {"model": network()})
    (folder / "cut.pt").write_bytes((folder / "whole.pt").read_bytes()[:500])
    torch.save({"model": network().state_dict(), "extra": Malicious()}, folder / "code.pt")
    torch.save([1, 2], folder / "list.pt")
    save_checkpoint(folder / "other.pt", {"model": network(width=4)})
    save_checkpoint(folder / "optimizer.pt", {}, iteration=1)
    return ["text", "empty", "cut", "code", "list", "other", "optimizer", "absent"]


def test_what_is_no_checkpoint_is_refused_in_one_line_and_changes_nothing(tmp_path, capsys):
    for name in bad_files(tmp_path):
        target = network(5)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path / f"{name}.pt", target)
        assert f"{name}.pt" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert torch.equal(target[0].weight, network(5)[0].weight)
    assert "executed" not in capsys.readouterr().out


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", {"model": network(1)})
    before = (tmp_path / "a.pt").read_bytes()

    def broken(content, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "a.pt", {"model": network(2)})
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
