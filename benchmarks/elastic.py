"""Training that is killed, runs out of disk, or goes on for long: what is left, and whether memory stays as it was.

    python benchmarks/elastic.py                       # half an hour, and hours for the soak; on CPU
    python benchmarks/elastic.py --subjects kill disk  # some of kill, hosts, disk, restore, soak
    python benchmarks/elastic.py --table               # the table of the newest results

kill, hosts: `jaxml finetune` of a tiny model (one process; two over loopback), which saves a checkpoint every third
step, is killed with SIGKILL 20 times, each time a random moment after it went on (of two processes either one; the
other is then killed too), until a last start ends by itself. After each kill every checkpoint that has a name is read.
The weights at the end are compared, bit by bit, with those of a run that nothing disturbed.
disk: the same on a file system of a few MiB that runs full, and on one that becomes read-only; then it is given room
again and the run goes on. Needs the right to mount (root, or user namespaces).
restore: 50 times a checkpoint of SmolLM2-135M's LoRA training is written and read; memory of the process and of the
device after each.
soak: 2,000 steps of LoRA on SmolLM2-135M (1 × 64 tokens), checkpoints every 200; memory over the last 1,500 steps.
Both run in a process of their own, once as it is and once with MALLOC_ARENA_MAX=1, with which glibc keeps one heap for
all threads: what grows in the first only is what it keeps of the heaps of threads that wrote checkpoints.
"""

import argparse
import datetime
import gc
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import about

SUBJECTS = ("kill", "hosts", "disk", "restore", "soak")
KILLS, STEPS = 20, 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=SUBJECTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="print the table of the newest results and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if options.inside:
        print(json.dumps(_on_small_disks(Path(options.inside))))
        return
    if options.alone:
        print(json.dumps({"restore": restore, "soak": soak}[options.alone]()))
        return

    date = datetime.date.today().isoformat()
    path = about.RESULTS / f"elastic-cpu-{date}.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    report |= {**about.made(), "cores": os.cpu_count()}
    made = {
        "kill": lambda: killed(1, options.seed), "hosts": lambda: killed(2, options.seed),
        "disk": disk, "restore": lambda: alone("restore"), "soak": lambda: alone("soak"),
    }  # fmt: skip
    for subject in options.subjects:
        report[subject] = made[subject]()
        print(subject, report[subject], flush=True)
        path.write_text(json.dumps(report, indent=1))


# ---- runs in processes of their own ------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """A tiny model and lines to learn."""
    from jaxml import lm
    from jaxml.testing import tiny_model

    lm.save(tiny_model(width=64, num_heads=8, num_kv_heads=4, hidden_dim=128), folder / "model")
    lines = [{"prompt": f"say {i} ", "response": "abcdefgh"[i % 8 :] + " x" * (i % 5)} for i in range(64)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def start(inputs: Path, out: Path, count: int = 1, steps: int = STEPS) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // count}",
        "XDG_CACHE_HOME": str(inputs / "cache"),
    }  # fmt: skip
    made = []
    for i in range(count):
        command = [sys.executable, "-m", "jaxml.cli.main", "finetune", inputs / "model", inputs / "train.jsonl"]
        command += ["--out", out, "--method", "full", "--steps", steps, "--batch-size", 4, "--length", 32]
        command += ["--save-every", 3, "--no-progress"]
        if count > 1:
            command += ["--coordinator", f"localhost:{port}", "--processes", count, "--process", i, "--heartbeat", 10]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        made.append(subprocess.Popen(list(map(str, command)), env=environment, **pipes))
    return made


def weights(out: Path) -> dict:
    from safetensors.numpy import load_file

    return load_file(out / "model" / "model.safetensors")


def killed(count: int, seed: int) -> dict:
    """How a run ends that was killed again and again."""
    from jaxml import log

    dice, started = random.Random(seed), time.time()
    with tempfile.TemporaryDirectory() as folder:
        inputs, out = Path(folder), Path(folder) / "killed"
        prepare(inputs)
        for process in start(inputs, inputs / "whole", count):
            process.communicate()
            assert process.returncode == 0
        kills, read, during_save, at = 0, 0, 0, []
        while True:
            processes = start(inputs, out, count)
            seen = lambda: len(log.read(out / "log.jsonl"))
            alive = lambda: all(process.poll() is None for process in processes)
            before = seen()
            if kills < KILLS:
                # At any time of its life: while it starts now and then, else a moment after it went on.
                late = time.time() + dice.uniform(0, 8) if dice.random() < 0.15 else None
                while alive() and (time.time() < late if late else seen() <= before):
                    time.sleep(0.005)
                time.sleep(0 if late else dice.uniform(0, 1.0))
                if alive():
                    partial = [p for p in (out / "checkpoints").glob("*") if "tmp" in p.name]
                    dice.choice(processes).send_signal(signal.SIGKILL)
                    kills, during_save = kills + 1, during_save + bool(partial)
                    at.append(seen())
                    time.sleep(dice.uniform(0, 0.5))
                    for process in processes:
                        process.kill()
            for process in processes:
                process.communicate()
            read += readable(inputs, out)
            if all(process.returncode == 0 for process in processes):
                break
        a, b = weights(inputs / "whole"), weights(out)
        same = set(a) == set(b) and all((a[name] == b[name]).all() for name in a)
        rows = [row["step"] for row in log.read(out / "log.jsonl") if "loss" in row]
    return {
        "processes": count, "kills": kills, "killed_while_saving": during_save, "steps_at_kills": at,
        "checkpoints_read": read, "bits_equal": bool(same), "steps_logged_once": rows == list(range(1, STEPS + 1)),
        "seconds": time.time() - started,
    }  # fmt: skip


def readable(inputs: Path, out: Path) -> int:
    """Reads every checkpoint that has its name; how many there are."""
    import jax
    import jax.numpy as jnp

    from jaxml import lm, tune
    from jaxml.checkpoint import Checkpoints
    from jaxml.tune.run import begin

    if not (out / "checkpoints").is_dir():
        return 0
    model = lm.load(inputs / "model")
    options = tune.Options(steps=STEPS, batch_size=4, length=32, learning_rate=2e-4)
    template = jax.eval_shape(lambda p: begin(p, tune.optimizer(options, STEPS)), model.params)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), template)
    with Checkpoints(out / "checkpoints", keep=None) as checkpoints:
        for step in checkpoints.steps():
            state = checkpoints.restore(template, step)
            assert int(state.step) == step and all(jnp.isfinite(a).all() for a in jax.tree.leaves(state.trainable))
        return len(checkpoints.steps())


# ---- disks -------------------------------------------------------------------------------------------


def disk() -> dict:
    """In a namespace of its own, where a small file system can be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        command = ["unshare", "-rm", sys.executable, __file__, "--inside", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(done.stdout.splitlines()[-1])


def _on_small_disks(folder: Path) -> dict:
    mount = lambda *how: subprocess.run(["mount", *map(str, how)], check=True)
    steps, found = 40, {}
    [process] = start(folder, folder / "whole", steps=steps)
    process.communicate()
    for name in ("full", "read_only"):
        place = folder / name
        place.mkdir()
        mount("-t", "tmpfs", "-o", "size=8m" if name == "full" else "size=64m", "none", place)
        if name == "full":  # room for a checkpoint or two
            (place / "ballast").write_bytes(bytes(5 * 2**20))
            [process] = start(folder, place / "run", steps=steps)
        else:
            [process] = start(folder, place / "run", steps=steps)
            while not list((place / "run" / "checkpoints").glob("[0-9]*")):
                time.sleep(0.02)
            busy = True
            while busy and process.poll() is None:  # a file that is being written keeps it from becoming so
                busy = subprocess.run(["mount", "-o", "remount,ro", place], capture_output=True).returncode != 0
        _, errors = process.communicate()
        found[name] = {"code": process.returncode, "said": errors.strip().splitlines()[-1][:300] if errors else ""}
        found[name]["checkpoints_read"] = readable_on(folder, place / "run")
        if name == "full":
            (place / "ballast").unlink()
            mount("-o", "remount,size=64m", place)
        else:
            mount("-o", "remount,rw", place)
        [process] = start(folder, place / "run", steps=steps)
        _, errors = process.communicate()
        a, b = weights(folder / "whole"), weights(place / "run") if process.returncode == 0 else {}
        found[name]["goes_on"] = process.returncode == 0
        found[name]["bits_equal"] = set(a) == set(b) and all(bool((a[k] == b[k]).all()) for k in a)
        subprocess.run(["umount", place], check=False)
    return found


def readable_on(inputs: Path, out: Path) -> int:
    """`readable` of a copy: a manager of checkpoints wants to write."""
    copy = inputs / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(out, copy)
    return readable(inputs, copy)


# ---- memory ------------------------------------------------------------------------------------------


def _memory() -> tuple[float, float]:
    """(of the process, of arrays on the device), MiB."""
    import jax

    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resident / 2**20, sum(a.nbytes for a in jax.live_arrays()) / 2**20


def _slope(rows: list[tuple[float, float, float]], column: int) -> float:
    """MiB per 1,000 steps, by least squares."""
    import numpy as np

    x, y = np.array([row[0] for row in rows]), np.array([row[column] for row in rows])
    return float(np.polyfit(x, y, 1)[0] * 1000)


def alone(subject: str) -> dict:
    """A subject in a process of its own, as it is and ("one_heap") where glibc keeps one heap."""

    def child(**more: str) -> dict:
        command = [sys.executable, __file__, "--alone", subject]
        done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return child() | {"one_heap": child(MALLOC_ARENA_MAX="1")}


def restore() -> dict:
    import jax

    from jaxml import lm, tune
    from jaxml.checkpoint import Checkpoints
    from jaxml.tune import adapters
    from jaxml.tune.run import begin

    model = lm.load("smollm2-135m")
    params = adapters.attach(model.params, jax.random.key(0), rank=8)
    trainable, _ = adapters.split(params)
    state = begin(trainable, tune.optimizer(tune.Options(steps=100), 100))
    rows = []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=2) as checkpoints:
        for step in range(50):
            checkpoints.save(step, state)
            checkpoints.wait()
            state = checkpoints.restore(state, step)
            gc.collect()
            rows.append((step, *_memory()))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state.trainable, trainable)
    later = rows[10:]
    return {
        "cycles": 50, "bits_equal": all(jax.tree.leaves(same)), "process_mib": [rows[0][1], later[0][1], rows[-1][1]],
        "device_mib": [rows[0][2], rows[-1][2]], "process_mib_per_cycle": _slope(later, 1) / 1000,
    }  # fmt: skip


def soak(steps: int = 2000) -> dict:
    import jax

    from jaxml import lm, log, tune
    from jaxml.tune import adapters

    model = lm.load("smollm2-135m")
    model = model.replace(params=adapters.attach(model.params, jax.random.key(0), rank=8))
    examples = [{"prompt": f"The code of {i} is", "response": f" {i * 7919 % 1000}."} for i in range(400)]
    options = tune.Options(steps=steps, batch_size=1, length=64, learning_rate=2e-4, unroll=True, save_every=200)
    rows, original, started = [], log.JSONL.write, time.time()

    def write(self, **row):
        original(self, **row)
        if "loss" in row and row["step"] % 20 == 0:
            rows.append((row["step"], *_memory()))

    log.JSONL.write = write
    try:
        with tempfile.TemporaryDirectory() as folder:
            _, info = tune.fit(model, examples, options, folder=folder, progress=False)
    finally:
        log.JSONL.write = original
    later = [row for row in rows if row[0] > 500]
    return {
        "steps": info["steps"], "loss": info["loss"], "seconds": time.time() - started,
        "process_mib": [rows[0][1], later[0][1], later[-1][1]], "device_mib": [later[0][2], later[-1][2]],
        "process_mib_per_1000_steps": _slope(later, 1), "device_mib_per_1000_steps": _slope(later, 2),
        "line": rows[::5],
    }  # fmt: skip


# ---- table -------------------------------------------------------------------------------------------


def table() -> str:
    """Markdown of the newest results."""
    lines = ["| what happened | how often | what was left |", "|---|---|---|"]
    for subject in SUBJECTS:
        if report := about.newest("elastic-cpu", lambda one, subject=subject: subject in one):
            lines += [f"| {' | '.join(row)} |" for row in _rows(subject, report[subject])]
    last = about.newest("elastic-cpu")
    return f"{last['cores']}-core CPU, {about.said(last)}:\n\n" + "\n".join(lines)


def _rows(subject: str, r: dict) -> list[tuple[str, str, str]]:
    yes = lambda good: "bit-identical weights" if good else "**other weights**"
    if subject in ("kill", "hosts"):
        what = "SIGKILL" if subject == "kill" else f"SIGKILL to one of {r['processes']} processes"
        often = f"{r['kills']} times, {r['killed_while_saving']} of them while a checkpoint was written"
        return [(what, often, f"{yes(r['bits_equal'])}; {r['checkpoints_read']} checkpoints read, all whole")]
    if subject == "disk":
        names = {"full": "the disk runs full", "read_only": "the disk becomes read-only"}
        left = lambda one: f"{one['checkpoints_read']} checkpoints whole; given room, {yes(one['bits_equal'])}"
        return [(names[k], f"ends with code {one['code']}", left(one)) for k, one in r.items()]
    rows = []
    for heaps, one in (("", r), (", MALLOC_ARENA_MAX=1", r["one_heap"])):
        process, device = one["process_mib"], one["device_mib"]
        flat = f"device {device[0]:.0f} → {device[1]:.0f} MiB, process {process[1]:.0f} → {process[2]:.0f} MiB"
        if subject == "restore":
            grown = f"over the last 40 ({one['process_mib_per_cycle']:+.2f} each)"
            rows.append(
                (f"saved and restored{heaps}", f"{one['cycles']} times", f"{yes(one['bits_equal'])}; {flat} {grown}")
            )
        else:
            grown = f"over the last 1,500 ({one['process_mib_per_1000_steps']:+.1f} per 1,000)"
            rows.append((f"trained on{heaps}", f"{one['steps']:,} steps", f"{flat} {grown}"))
    return rows


if __name__ == "__main__":
    main()
