"""Tiles that were measured: how they are found, kept and taken; no GPU, so that a function stands for the clock."""

import dataclasses

import pytest

from jaxml.attention import blocks, tune, tuned
from jaxml.attention.blocks import GpuCut, HopperCut
from jaxml.attention.cases import CASES
from jaxml.cli.main import main
from jaxml.target import target

causal = next(case for case in CASES if case.name == "causal")


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXML_BLOCKS", str(tmp_path / "blocks.json"))
    return tmp_path / "blocks.json"


def cut(backend, which, T=1024, H=128):
    of = {"triton": blocks.gpu_cut, "mosaic_gpu": blocks.hopper_cut}[backend]
    return of(T, H, H, "bfloat16", which)


@pytest.mark.parametrize("backend, kind", [("triton", GpuCut), ("mosaic_gpu", HopperCut)])
def test_the_fastest_candidate_is_kept_and_taken(backend, kind, file):
    tried = []

    def seconds(function, arrays):
        tiles = [cut(backend, which) for which in tune.KERNELS]
        tried.append(tiles)
        if tiles[0].columns == 64:
            raise RuntimeError("does not compile")
        return sum(t.rows + t.columns / 8 + t.stages / 64 for t in tiles)

    with target("NVIDIA H100"):
        entries = tune.tune(causal.scaled(T=1024, H=128), "bfloat16", backend, seconds, report=lambda line: None)
        default = cut(backend, "forward")
    assert len(tried) == sum(len(list(tune.candidates(backend, which, 128, 128))) for which in tune.KERNELS)
    tuned.save("cpu", entries)  # what this machine calls itself
    for which in tune.KERNELS:
        candidates = [c for c in tune.candidates(backend, which, 128, 128) if which != "forward" or c.columns != 64]
        assert cut(backend, which) == min(candidates, key=lambda c: c.rows + c.columns / 8 + c.stages / 64)
        assert isinstance(cut(backend, which, T=600), kind)  # the same power of two
    with target("NVIDIA H100"):
        assert cut(backend, "forward") == default  # another device is not this one
    before = file.read_text()
    other = tuned.name(backend, "forward", 4096, 64, "bfloat16")
    tuned.save("cpu", {other: dataclasses.asdict(default)})
    assert len(file.read_text()) > len(before) and cut(backend, "forward", T=4096, H=64) == default


def test_where_no_candidate_runs_it_is_said():
    def fails(function, arrays):
        raise RuntimeError

    with target("NVIDIA H100"), pytest.raises(RuntimeError, match="kernel forward run, none does for causal"):
        tune.tune(causal, "bfloat16", "triton", fails, report=lambda line: None)
    with target("NVIDIA A100"), pytest.raises(NotImplementedError, match=r"mosaic_gpu cannot compute causal: .*8\.0"):
        tune.tune(causal, "bfloat16", "mosaic_gpu", fails)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"cpu": {"triton": 3}}', '{"cpu": 1}'])
def test_a_file_of_something_else_is_refused_and_left_alone(text, file):
    file.write_text(text)
    with pytest.raises(ValueError, match="Delete it, or name another file in JAXML_BLOCKS"):
        tuned.find("triton", "forward", 1024, 64, "bfloat16")
    with pytest.raises(ValueError, match="Delete it"):
        tuned.save("cpu", {})
    assert file.read_text() == text


def test_the_command(capsys):
    argv = ["bench", "attention", "--lengths", "64", "--widths", "16", "--heads", "2"]
    assert main([*argv, "--dtype", "float32"]) == 0
    assert "T64 H16" in (out := capsys.readouterr().out) and "blockwise" in out
    assert main([*argv, "--json"]) == 0 and '"forward_ms"' in capsys.readouterr().out
    assert main([*argv, "--tune"]) == 2
    said = capsys.readouterr()
    assert "it needs a GPU, this is cpu" in said.out and "none runs here" in said.err
    assert main(["bench", "attention", "--lengths", "0"]) == 2
    assert "--lengths is at least 1, got 0" in capsys.readouterr().err
