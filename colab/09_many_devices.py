# %% [markdown]
# # Many devices, and devices that are not there
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxml/jaxml/blob/main/colab/09_many_devices.ipynb)
#
# One table says which axis of an array is spread over which axis of a mesh; the same training runs on one device, on eight, or on many hosts. And what a TPU slice could train can be known without one: `jaxml plan` compiles the real step for it. Eight devices are simulated on the CPU here, whatever the runtime: set `SIMULATED` to False where there are eight real ones.

# %%
# %pip install -q "jaxml[lm,plot,tpu] @ git+https://github.com/jaxml/jaxml"

# %%
import os
import subprocess
import sys
import tempfile

SIMULATED = True  # before jax is imported
if SIMULATED:
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}

import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxml import log, parallel, testing, tune
from jaxml.parallel.program import Program
from jaxml.tune.place import begun, for_training
from jaxml.tune.step import make_step

SMOKE = "JAXML_SMOKE" in os.environ  # smallest sizes, for tests
print(jax.devices()[0].device_kind, "×", jax.device_count())
if SIMULATED:
    print("No accelerator is used: eight devices are simulated.")
if jax.device_count() != 8:
    print(f"The cells on meshes want 8 devices, here are {jax.device_count()}. Set SIMULATED to True and restart the runtime.")

# %% [markdown]
# ## The table
#
# `parallel.RULES`: logical axes of parameters, states, batches and caches, and the axes of the mesh that they may be spread over.

# %%
for logical, axes in parallel.RULES.items():
    print(f"{logical:10} → {axes if axes else 'on every device'}")

# %% [markdown]
# ## The same training on other meshes
#
# A small Llama, the same data and seed. Only the mesh differs.

# %%
model = testing.tiny_model(width=64, num_heads=8, num_kv_heads=8, hidden_dim=128)
examples = [{"prompt": f"say {i} ", "response": "abcdefgh"[i % 8 :] + " x" * (i % 5)} for i in range(64)]
options = tune.Options(steps=3 if SMOKE else 30, batch_size=8, length=32, learning_rate=3e-3)
meshes = ["one device", "fsdp=8"] if SMOKE else ["one device", "data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "context=4,data=2"]
losses = {}
for name in meshes:
    mesh = None if name == "one device" else parallel.parse(name)
    folder = tempfile.mkdtemp()
    tune.fit(model, examples, options, mesh=mesh, folder=folder, progress=False)
    losses[name] = np.array([row["loss"] for row in log.read(f"{folder}/log.jsonl") if "loss" in row])
    print(f"{name:24} largest difference of a loss {np.abs(losses[name] - losses['one device']).max():.1e}")

# %%
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for n, (name, of) in enumerate(losses.items()):
    axes.plot(range(1, len(of) + 1), of, label=name, linewidth=6 - n, alpha=0.6)
axes.set(title="One curve, drawn once a mesh", xlabel="optimizer step", ylabel="loss (nats per learnt token)")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What each device holds, and what is sent
#
# From the compiled step itself, made by the parts that `tune.fit` is made of: `begun` places parameters and states, `make_step` is the step, `Program` reads what was compiled. What is counted are the results of its collectives on simulated devices; a TPU's network may send more or less for each.

# %%
size = {} if SMOKE else dict(width=256, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=32, hidden_dim=1024, vocab_size=2048)
wide = testing.tiny_model(**size)


def compiled_step(name):
    mesh, tx = parallel.parse(name), tune.optimizer(options, 100)
    state, frozen, shardings, place = begun(*for_training(wide.params, {}, options), tx, mesh)
    batch = {key: np.ones((1, 8, 32), np.int32) for key in ("tokens", "targets", "segment_ids", "positions")}
    batch = place(batch | {"weights": np.ones((1, 8, 32), np.float32)})
    with jax.set_mesh(mesh):
        return make_step(wide.config, tx, options, shardings).lower(state, frozen, batch).compile()


names = ["data=8", "fsdp=8"] if SMOKE else ["data=8", "fsdp=8", "tensor=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2"]
held, sent = {}, {}
for name in names:
    compiled = compiled_step(name)
    held[name] = compiled.memory_analysis().argument_size_in_bytes / 2**20
    sent[name] = {}
    for c in Program(compiled.as_text()).collectives():
        sent[name][c.kind] = sent[name].get(c.kind, 0) + c.times * c.bytes / 2**20
    print(f"{name:24} holds {held[name]:6.1f} MiB, sends", {kind: f"{of:.1f} MiB" for kind, of in sent[name].items()})

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
left.barh(names[::-1], [held[n] for n in names[::-1]], color="#1f5fa8")
left.set(title="Weights, moments and batch on one device", xlabel="memory (MiB)", ylabel="mesh")
ends = np.zeros(len(names))
for kind, colour in zip(dict.fromkeys(kind for of in sent.values() for kind in of), ("#1f5fa8", "#d9822b", "#5b8c5a", "#8b5fbf", "#9aa4b0")):
    values = np.array([sent[n].get(kind, 0) for n in names[::-1]])
    right.barh(names[::-1], values, left=ends, label=kind, color=colour)
    ends += values
right.set(title="Sent by a device in one step", xlabel="traffic (MiB)", ylabel="mesh")
right.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.2))
plt.show()

# %% [markdown]
# ## A slice that is not there
#
# What fine-tuning Llama-3.2-1B takes on four v5e chips, by QLoRA and in full: libtpu compiles the step for that slice on any machine. The first command is `jaxml plan llama-3.2-1b --topology v5e:2x2 --remat --method qlora --rank 16 --length 1024`.

# %%
environment = os.environ | {"FORCE_COLOR": "", "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def plan(*options):
    """The command in a process of its own, which needs no device."""
    command = [sys.executable, "-m", "jaxml.cli.main", "plan", "llama-3.2-1b", "--topology", "v5e:2x2", "--remat", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout or done.stderr)


if not SMOKE:
    plan("--method", "qlora", "--rank", "16", "--length", "1024")
    plan("--method", "full", "--length", "1024")

# %% [markdown]
# Without a size, as in `--topology v5e`, ever larger slices are tried until it fits; a table for Llama-3.1-8B, -70B and Qwen3-32B over four generations is in the [README](https://github.com/jaxml/jaxml#measured). On many hosts the same command runs on each: `jaxml finetune … --coordinator HOST:PORT --processes N --process I`.
