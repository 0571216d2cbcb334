"""Several real processes on this machine, which find each other over loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxml import lm, log
from jaxml.parallel import hosts
from jaxml.testing import tiny_model

OPTIONS = ["--steps", "12", "--batch-size", "8", "--length", "32", "--save-every", "4", "--no-progress"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    lm.save(tiny_model(width=64, num_heads=8, num_kv_heads=4, hidden_dim=128), folder / "model")
    lines = [{"prompt": f"say {i} ", "response": "abcdefgh"[i % 8 :] + " x" * (i % 5)} for i in range(64)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def start(inputs, out, count, *options, each=None):
    """`jaxml finetune` as so many processes of 4 devices together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    devices = f"--xla_force_host_platform_device_count={4 // count}"
    environment = os.environ | {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"}
    # A folder of compiled programs for each: what one process compiled, of its devices, is none of another's.
    made = []
    for i in range(count):
        command = [sys.executable, "-m", "jaxml.cli.main", "finetune", inputs / "model", inputs / "train.jsonl"]
        command += ["--out", out, *OPTIONS, *options, *(each[i] if each else ())]
        if count > 1:
            command += ["--coordinator", f"localhost:{port}", "--processes", count, "--process", i, "--heartbeat", 10]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        made.append(subprocess.Popen(list(map(str, command)), env=environment, **pipes))
    return made


def finish(processes):
    ends = [process.communicate(timeout=300) for process in processes]
    return [process.returncode for process in processes], [end[0] for end in ends], [end[1] for end in ends]


def results(out):
    import safetensors.numpy as safetensors

    (file,) = [*out.glob("model/*.safetensors"), *out.glob("adapter/*.safetensors")]
    losses = [row["loss"] for row in log.read(out / "log.jsonl") if "loss" in row]
    return losses, safetensors.load_file(file)


@pytest.mark.slow
@pytest.mark.parametrize("count, method", [(2, ("full",)), (4, ("qlora", "--rank", "4"))])
def test_several_processes_train_as_one(inputs, tmp_path, count, method):
    for name, processes in (("one", 1), ("many", count)):
        codes, said, errors = finish(start(inputs, tmp_path / name, processes, "--method", *method))
        assert codes == [0] * processes, errors
        assert all("steps, loss" not in text for text in said[1:])  # one of them prints
    assert f"4 devices of {count} processes: fsdp=4" in said[0]
    one, many = results(tmp_path / "one"), results(tmp_path / "many")
    np.testing.assert_allclose(many[0], one[0], atol=1e-5)
    assert set(one[1]) == set(many[1])
    assert max(float(abs(one[1][k] - many[1][k]).max()) for k in one[1]) < 1e-5


@pytest.mark.slow
def test_what_processes_are_given_otherwise_is_told_by_all_of_them(inputs, tmp_path):
    def two(*other):
        one, another = start(inputs, tmp_path / "run", 2, each=((), other))
        codes, _, errors = finish([one, another])
        assert codes == [2, 2], errors
        return [error.strip().splitlines()[-1] for error in errors]

    for other, named in ((("--rank", "4"), "--rank, --alpha."), (("--mesh", "data=4"), "--mesh.")):
        assert two(*other) == [f"jaxml: finetune: all processes are given the same, and they differ in {named}"] * 2
    (tmp_path / "run.jsonl").write_text('{"text": "a"}\n')
    told = two("--eval", str(tmp_path / "none.jsonl"))
    assert told[0].startswith("jaxml: process 1: ") and all(line.endswith("none.jsonl: no such file.") for line in told)
    assert "differ in --eval" in two("--eval", str(tmp_path / "run.jsonl"))[0]
    assert not (tmp_path / "run").exists()


def test_who_waits_in_vain_ends_with_a_sentence():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"process 0 does not answer at localhost:{port}"):
        hosts.start(f"localhost:{port}", 2, 1, wait_s=1)
    code = f"from jaxml.parallel import hosts; hosts.start('localhost:{port}', 2, 0, wait_s=2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "not all 2 processes came" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_one_step_and_another_number_goes_on(inputs, tmp_path):
    out = tmp_path / "run"
    long = ["--method", "full", "--steps", "400", "--save-every", "0"]
    processes = start(inputs, out, 2, *long)
    deadline = time.monotonic() + 120
    while len(log.read(out / "log.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    codes, _, errors = finish(processes)
    assert codes == [128 + signal.SIGTERM] * 2, errors
    stopped = [error.rsplit("after step ", 1)[1].split(";")[0] for error in errors]
    assert stopped[0] == stopped[1] and (out / "checkpoints" / stopped[0]).is_dir()
    (last,) = start(inputs, out, 1, *long)
    while len(log.read(out / "log.jsonl")) < int(stopped[0]) + 2 and last.poll() is None:
        time.sleep(0.1)
    last.send_signal(signal.SIGTERM)
    codes, _, errors = finish([last])
    assert codes == [128 + signal.SIGTERM], errors
    steps = [row["step"] for row in log.read(out / "log.jsonl") if "loss" in row]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > int(stopped[0])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("host", 2, 0), "HOST:PORT .a port in 1 … 65535, no scheme. or auto, got 'host'"),
        (("http://host:1", 2, 0), "HOST:PORT"),
        ((":1", 2, 0), "HOST:PORT"),
        (("host:0", 2, 0), "HOST:PORT"),
        (("host:99999", 2, 0), "HOST:PORT"),
        (("host:1", 0, 0), "processes is at least 1, got 0"),
        (("host:1", 2, None), "given together"),
        (("host:1", 2, 2), "process is in 0 … 1, got 2"),
    ],
)
def test_wrong_addresses_and_numbers_are_sentences(arguments, said):
    with pytest.raises(ValueError, match=said):
        hosts.start(*arguments)


def test_a_scheduler_of_several_processes_is_noticed(monkeypatch):
    for name in ("TPU_WORKER_HOSTNAMES", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert not hosts.called()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not hosts.called()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert hosts.called()
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t0,t1")
    assert hosts.called()


def test_a_single_process_is_the_main_one(capsys):
    hosts.meet("nowhere")
    hosts.say("once")
    assert hosts.is_main() and capsys.readouterr().out == "once\n"
    np.testing.assert_array_equal(hosts.to_host(jax.numpy.arange(3)), [0, 1, 2])
